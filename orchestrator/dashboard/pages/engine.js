// One engine: what it is, what happened to it, what it says, and what can be done about it.

import { call, get, lines, request } from "../api.js";
import { confirmed } from "../dialog.js";
import { badge, copyButton, h, keyed, note } from "../dom.js";
import { ago, clock, duration, serverNow, when } from "../format.js";
import { remembered } from "./overview.js";

const LOG_LINES = 1000;
const HEALTH_HOURS = 24;

// What can be done, in which states, and what is asked before.
const ACTIONS = [
  ["Start", "start", ["stopped", "failed"], "The engine boots with its data, key and URL as they are."],
  ["Wake", "start", ["sleeping"], "The engine goes on where it was put to sleep."],
  ["Recover", "recover", ["failed"], "One more attempt now, whatever the back-off says."],
  ["Sleep", "sleep", ["running"], "It is frozen in memory where the backend can. A turn in flight prevents it."],
  ["Stop", "stop", ["running", "sleeping", "failed", "provisioning"],
    "SIGTERM, 30 s, SIGKILL; a turn in flight is lost. The data stays. Only a start brings it back."],
  ["Rotate key", "rotate-key", ["running", "sleeping", "stopped", "failed"],
    "The product gets the new key with its next admit; the old one stays valid for five minutes."],
];

export function enginePage(engineId) {
  let engine = null;
  let audit = [];
  let older = []; // pages asked for by hand
  let hasMore = false;
  let destroyed = false;
  const abort = new AbortController();

  const title = h("h1", {}, "…");
  const state = h("span");
  const subtitle = h("p.muted.subtitle");
  const actions = h("div.actions", { role: "group", "aria-label": "Actions" });
  const problem = h("div.problem", { hidden: true, role: "alert" });
  const facts = h("dl.facts");
  const timeline = h("div.timeline");
  const timelineText = h("p.muted", {}, "…");
  const health = h("div.strip", { role: "img" });
  const healthRows = h("ul.rows");
  const body = h("tbody");
  const more = h("button", { type: "button", hidden: true, onclick: showOlder }, "Older");
  const filter = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter the audit", oninput: showAudit });
  const log = logPane(abort.signal);

  const element = h("div.page", {},
    h("p.crumbs", {}, h("a", { href: "#/engines" }, "Engines"), " / ", h("code", {}, engineId.slice(0, 8))),
    h("div.head", {}, title, state, h("span.space"), actions), subtitle, problem,
    h("div.columns.wide", {},
      h("section.card", { "aria-label": "Facts" }, h("h3", {}, "Facts"), facts),
      h("div.stack", {},
        h("section.card", { "aria-label": "Last operation" }, h("h3", {}, "Last operation"), timeline, timelineText),
        h("section.card", { "aria-label": "Health" }, h("h3", {}, `Health, last ${HEALTH_HOURS} h`), health, healthRows))),
    log.element,
    h("section.card.table", { "aria-label": "Audit" },
      h("div.head", {}, h("h3", {}, "Audit"), h("span.space"), filter),
      h("table", {}, h("thead", {}, h("tr", {}, ["When", "Action", "By", "State", "Took", "Details"].map((name) =>
        h("th", { scope: "col" }, name)))), body), more));

  const path = () => `/engines/${encodeURIComponent(engine.user_id)}`;

  async function refresh() {
    const found = await get(`/dashboard/data/engines/${engineId}`);
    engine = found.engine;
    audit = found.audit;
    hasMore = older.length ? hasMore : found.has_more;
    showEngine();
    showAudit();
    showHealth();
    if (destroyed) return;
    log.follow(engine);
    await showTimeline();
  }

  function showEngine() {
    destroyed = engine.status === "destroyed";
    title.textContent = engine.user_id ?? "(pool)";
    state.replaceChildren(badge(engine.status));
    subtitle.replaceChildren(...[
      h("a", { href: `#/engines?product=${engine.product_id}` }, engine.product ?? "a product that is gone"),
      engine.url ? [" · ", h("code", {}, engine.url)] : [],
      " · ", h("code", {}, engine.engine_id), " ", copyButton(engine.engine_id, "Copy id"),
    ].flat());
    keyed(actions, destroyed ? [] : [...ACTIONS, ["Destroy"]].map(([verb, , states]) =>
      [verb, !states || states.includes(engine.status)]).filter(([, possible]) => possible),
    ([verb]) => verb, ([verb]) => h(verb === "Destroy" ? "button.danger" : "button", {
      type: "button", onclick: () => (verb === "Destroy" ? destroy() : act(verb)),
    }, verb));
    const error = engine.last_error;
    problem.hidden = !error;
    if (error) problem.textContent = `${error.code ?? "error"}: ${error.message ?? ""}`;
    const rows = destroyed ? [["Destroyed", `${when(engine.destroyed_at)} (${ago(engine.destroyed_at)})`]] : [
      ["Image", engine.engine_version],
      ["Operation", engine.operation ? `${engine.operation}, since ${ago(engine.operation_started_at)}` : "none"],
      ["Wanted", engine.wish],
      ["Deadline", engine.deadline_at && ago(engine.deadline_at)],
      ["Running since", engine.running_since && ago(engine.running_since)],
      ["Asleep since", engine.slept_at && ago(engine.slept_at)],
      ["Last healthy", ago(engine.last_health_at)],
      ["Last admit", ago(engine.last_admit_at)],
      ["Kept awake until", engine.keep_alive_until && when(engine.keep_alive_until)],
      ["Failed probes", engine.consecutive_failures || null],
      ["Restart attempt", engine.restart_attempt || null],
      ["Next restart", engine.next_restart_at && ago(engine.next_restart_at)],
      ["Restarts parked", engine.restart_parked_until && ago(engine.restart_parked_until)],
      ["Last boot", duration(engine.boot_duration_ms)],
      ["Key", `generation ${engine.key_generation}${engine.applied_generation < engine.key_generation
        ? `, the engine has ${engine.applied_generation}` : ""}`],
      ["Created", `${when(engine.created_at)} (${ago(engine.created_at)})`],
      ["Object", engine.container_id && engine.container_id.slice(0, 24)],
      ["Incarnation", engine.incarnation],
    ];
    keyed(facts, rows.filter(([, value]) => value !== null && value !== undefined), ([name]) => name,
      ([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))));
    if (destroyed) {
      timelineText.textContent = "The engine is gone.";
      timeline.replaceChildren();
      log.end("The engine is gone.");
    }
  }

  // --- the timeline as a bar -------------------------------------------------------------------------------

  async function showTimeline() {
    let told;
    try {
      told = await get(`${path()}/timeline`, { productId: engine.product_id });
    } catch (error) {
      if (error.status !== 404) throw error;
      timelineText.textContent = "No timeline.";
      return;
    }
    if (!told.operation) {
      timelineText.textContent = "No operation yet.";
      timeline.replaceChildren();
      return;
    }
    const sum = told.phases.reduce((all, phase) => all + (phase.duration_ms ?? 0), 0);
    keyed(timeline, told.phases, (phase) => `${phase.name} ${phase.started_at}`, (phase) => {
      const open = phase.duration_ms === null;
      return h("span.phase", {
        title: `${phase.name}: ${open ? "under way" : duration(phase.duration_ms)}`, dataset: { phase: phase.name, open: String(open) },
        // Short phases stay visible; the text beside it has the figures.
        style: { flexGrow: String(Math.max(open ? sum / 4 : phase.duration_ms, sum / 50, 1)) },
      }, h("span", {}, phase.name), h("small", {}, open ? "…" : duration(phase.duration_ms)));
    });
    timeline.setAttribute("role", "img");
    timeline.setAttribute("aria-label", told.phases.map((phase) => `${phase.name} ${duration(phase.duration_ms)}`).join(", "));
    timelineText.textContent = [
      told.operation, told.status, told.duration_ms === null ? `since ${ago(told.started_at)}` : `took ${duration(told.duration_ms)}`,
      told.started_at ? `began ${when(told.started_at)}` : null, told.stalled_on ? `stalled on ${told.stalled_on}` : null,
      told.last_log ? `last line: ${told.last_log}` : null,
    ].filter(Boolean).join(" · ");
  }

  // --- health: the states as a strip, and what went wrong -----------------------------------------------------

  function showHealth() {
    const end = serverNow();
    const begin = Math.max(end - HEALTH_HOURS * 3600e3, 0);
    const changes = [...audit, ...older].filter((row) => row.status).reverse();
    const spans = [];
    for (const [index, row] of changes.entries()) {
      const from = Math.max(Date.parse(row.timestamp), begin);
      const to = index + 1 < changes.length ? Date.parse(changes[index + 1].timestamp) : end;
      if (to > begin) spans.push([row.id, row.status, from, to]);
    }
    const first = spans.length ? spans[0][2] : end;
    if (first > begin) spans.unshift(["before", "none", begin, first]);
    keyed(health, spans.map(([id, status, from, to]) => [id, status, Math.round(from / 6e4), Math.round((to - from) / 6e4)]),
      ([id]) => id, ([, status, from, minutes]) => h("span", {
        dataset: { status }, style: { flexGrow: String(Math.max(minutes, 2)) },
        title: status === "none" ? "before its first row" : `${status} from ${when(new Date(from * 6e4).toISOString())}`,
      }));
    health.setAttribute("aria-label", spans.map(([, status, from, to]) => `${status} for ${duration(to - from)}`).join(", "));
    const signs = audit.filter((row) => /^(health_|auto_restart_|recover|provision_failed)/.test(row.action)).slice(0, 6);
    keyed(healthRows, signs, (row) => row.id, (row) => h("li", {}, h("time.muted", { datetime: row.timestamp }, clock(row.timestamp)),
      h("code", {}, row.action), h("span.muted.clip", {}, row.metadata.message ?? row.metadata.code ?? ""), h("span.space"),
      row.status ? badge(row.status) : null));
  }

  // --- audit -------------------------------------------------------------------------------------------------

  function showAudit() {
    const wanted = filter.value.trim().toLowerCase();
    const last = audit.at(-1)?.id ?? 0;
    const rows = [...audit, ...older.filter((row) => row.id < last)]
      .filter((row) => !wanted || JSON.stringify(row).toLowerCase().includes(wanted));
    keyed(body, rows, (row) => row.id, (row) => h("tr", {},
      h("td", { dataset: { label: "When" }, title: `row ${row.seq}` }, when(row.timestamp)),
      h("td", { dataset: { label: "Action" } }, h("code", {}, row.action)),
      h("td", { dataset: { label: "By" } }, row.actor),
      h("td", { dataset: { label: "State" } }, row.status ? badge(row.status) : ""),
      h("td", { dataset: { label: "Took" } }, row.duration_ms === null ? "" : duration(row.duration_ms)),
      h("td.details", { dataset: { label: "Details" } }, Object.entries(row.metadata).map(([name, value]) =>
        h("span", {}, h("span.muted", {}, `${name} `), typeof value === "object" ? JSON.stringify(value) : String(value))))));
    more.hidden = !hasMore;
  }

  async function showOlder() {
    const before = [...audit, ...older].at(-1).id;
    try {
      const found = await get(`/dashboard/data/engines/${engineId}?before=${before}`);
      older = [...older, ...found.audit];
      hasMore = found.has_more;
      showAudit();
    } catch (error) {
      note(error.message, "error");
    }
  }

  // --- actions -----------------------------------------------------------------------------------------------

  async function act(verb) {
    const [, name, , text] = ACTIONS.find(([one, , states]) => one === verb && states.includes(engine.status)) ?? [];
    if (!name) return;
    const done = await confirmed({
      title: `${verb}: ${engine.user_id}`, text, verb,
      act: () => call("POST", `${path()}/${name}`, { productId: engine.product_id }),
    });
    if (done) {
      note(name === "rotate-key" && done.restarted ? "Key rotated; the engine was restarted for it." : `${verb}: done.`);
      await refresh().catch((error) => note(error.message, "error"));
    }
  }

  async function destroy() {
    const snapshot = h("select", {}, h("option", { value: "" }, "no"), h("option", { value: "true" }, "yes"));
    const done = await confirmed({
      title: `Destroy: ${engine.user_id}`, danger: true, verb: "Destroy", typed: engine.user_id,
      text: "The engine, its data, its port and its key are removed. This cannot be undone.",
      fields: { snapshot: { label: "Take a snapshot first", element: snapshot } },
      act: (values) => call("DELETE", `${path()}${values.snapshot ? "?snapshot=true" : ""}`, { productId: engine.product_id }),
    });
    if (done) {
      note("Destroyed.");
      await refresh().catch((error) => note(error.message, "error"));
    }
  }

  return {
    title: "Engine", element, refresh, onEvent: remembered,
    destroy() {
      abort.abort();
      log.end(null);
    },
  };
}

// --- the live log: bounded, and still when one reads further up ----------------------------------------------------

function logPane(signal) {
  const box = h("pre.log", { tabindex: "0", "aria-label": "Log lines" });
  const status = h("span.muted", { role: "status" }, "");
  const filter = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter the log", oninput: () => {
    for (const line of box.children) hide(line);
  } });
  const element = h("section.card.logs", { "aria-label": "Log" },
    h("div.head", {}, h("h3", {}, "Log"), status, h("span.space"), filter), box);
  let following = null;
  let stop = null;

  const hide = (line) => { line.hidden = !line.textContent.toLowerCase().includes(filter.value.trim().toLowerCase()); };

  function add({ timestamp, stream, line }) {
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    const row = h("div", { dataset: { stream } }, h("time.muted", {}, timestamp ? `${clock(timestamp)} ` : ""), line);
    hide(row);
    box.append(row);
    while (box.childElementCount > LOG_LINES) box.firstElementChild.remove();
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  async function read(engine, abort) {
    status.textContent = "connecting";
    try {
      const path = `/engines/${encodeURIComponent(engine.user_id)}/logs?tail=300&follow=true`;
      const response = await request("GET", path, { productId: engine.product_id, signal: abort.signal });
      box.replaceChildren();
      status.textContent = "live";
      for await (const line of lines(response)) if (line) add(JSON.parse(line));
      status.textContent = "ended";
    } catch (error) {
      if (abort.signal.aborted) return;
      status.textContent = error.message;
    }
    following = null; // the next refresh asks again
  }

  return {
    element,
    /** Follows this engine, unless that is what it does. */
    follow(engine) {
      if (following === engine.engine_id || signal.aborted) return;
      following = engine.engine_id;
      stop?.abort();
      stop = new AbortController();
      read(engine, stop);
    },
    end(text) {
      stop?.abort();
      following = null;
      if (text) status.textContent = text;
    },
  };
}
