// The fleet at a glance: now, and over time.

import { get, health } from "../api.js";
import { chart } from "../chart.js";
import { badge, h, keyed } from "../dom.js";
import { ago, clock, duration, integer } from "../format.js";
import { STATES, engineLink, productSelect } from "./shared.js";

const WINDOWS = [[1, "1 h"], [6, "6 h"], [24, "24 h"], [168, "7 d"]];
const HISTORY_EVERY_MS = 10000;
const feed = []; // kept while the page is open, whichever page is shown

export function overviewPage(params) {
  let hours = Number(params.get("hours")) || 24;
  let productId = params.get("product") ?? "";
  let history = { key: null, at: 0 };

  const total = h("b.big", {}, "–");
  const tiles = h("div.tiles", { role: "list" });
  const ratio = h("div.ratio", { role: "img" });
  const figures = h("dl.figures");
  const subsystems = h("ul.subsystems", { "aria-label": "Orchestrator" });
  const failing = h("ul.rows");
  const noneFailing = h("p.empty", {}, "Nothing has failed.");
  const events = h("ul.rows.feed");
  const noEvents = h("p.empty", {}, "Nothing happened since this page was opened.");
  const products = productSelect(() => productId, (value) => { productId = value; remember(); });

  const milliseconds = (value) => duration(value);
  const charts = {
    states: chart({
      title: "Engines by state", stacked: true, format: integer, height: 220,
      series: STATES.map((state) => ({ label: state, colour: state })),
    }),
    boot: chart({
      title: "Time to boot", format: milliseconds,
      series: [{ label: "p50", colour: "series-1" }, { label: "p95", colour: "series-2" }],
    }),
    wake: chart({
      title: "Time to wake", format: milliseconds,
      series: [{ label: "p50", colour: "series-1" }, { label: "p95", colour: "series-2" }],
    }),
    restarts: chart({
      title: "Failures and restarts", format: integer,
      series: [
        { label: "failures", colour: "failed", kind: "bars" }, { label: "restarts", colour: "provisioning", kind: "bars" },
      ],
    }),
    refused: chart({
      title: "Refused admits", format: integer,
      series: [
        { label: "other", colour: "stopped", kind: "bars" }, { label: "rate limit", colour: "series-2", kind: "bars" },
      ],
    }),
  };

  const windows = h("div.segments", { role: "group", "aria-label": "Time" }, WINDOWS.map(([value, label]) =>
    h("button", { type: "button", "aria-pressed": String(value === hours), dataset: { hours: String(value) }, onclick: () => {
      hours = value;
      for (const button of windows.children) button.setAttribute("aria-pressed", String(Number(button.dataset.hours) === hours));
      remember();
    } }, label)));

  function remember() {
    const query = new URLSearchParams({ hours, ...(productId ? { product: productId } : {}) });
    window.history.replaceState(null, "", `#/?${query}`);
    refresh();
  }

  const element = h("div.page", {},
    h("div.head", {}, h("h1", {}, "Fleet"), h("span.space"), products.element, windows),
    h("section.card.now", { "aria-label": "Now" },
      h("div.total", {}, total, h("span.muted", {}, "engines")), h("div.grow", {}, ratio, tiles)),
    h("div.columns", {},
      h("section.card", { "aria-label": "Last hour" }, h("h3", {}, "Last hour"), figures),
      h("section.card", { "aria-label": "Orchestrator" }, h("h3", {}, "Orchestrator"), subsystems)),
    charts.states.element,
    h("div.columns", {}, charts.boot.element, charts.wake.element, charts.restarts.element, charts.refused.element),
    h("div.columns", {},
      h("section.card", { "aria-label": "Failed engines" }, h("h3", {}, "Failed engines"), failing, noneFailing),
      h("section.card", { "aria-label": "Events" }, h("h3", {}, "Events"), events, noEvents)));

  async function refresh() {
    const filter = productId ? `&product_id=${productId}` : "";
    const key = `${hours} ${productId}`;
    // The past is asked for less often than the present.
    const wantsHistory = history.key !== key || Date.now() - history.at > HISTORY_EVERY_MS;
    const [engines, own, fleet] = await Promise.all([
      get(`/dashboard/data/engines?status=failed&limit=8&sort=-last_health_at${filter}`),
      health().catch(() => null),
      wantsHistory ? get(`/dashboard/data/fleet?hours=${hours}${filter}`) : null,
    ]);
    showNow(engines.by_status);
    showHealth(own);
    keyed(failing, engines.engines, (one) => one.engine_id, (one) => h("li", {},
      engineLink(one), h("span.muted", {}, one.product), h("span.space"),
      h("code", {}, one.error_code ?? ""), h("span.muted", {}, one.restart_attempt ? `attempt ${one.restart_attempt}` : "")));
    noneFailing.hidden = engines.engines.length > 0;
    showEvents();
    if (fleet && key === `${hours} ${productId}`) {
      history = { key, at: Date.now() };
      showFleet(fleet);
    }
  }

  function showNow(byStatus) {
    const sum = STATES.reduce((all, state) => all + byStatus[state], 0);
    total.textContent = integer(sum);
    keyed(tiles, STATES.map((state) => [state, byStatus[state], productId]), ([state]) => state, ([state, count]) =>
      h("a.tile", { href: `#/engines?status=${state}${productId ? `&product=${productId}` : ""}`, role: "listitem",
        dataset: { status: state, none: String(count === 0) } }, h("b", {}, integer(count)), badge(state)));
    keyed(ratio, STATES.filter((state) => byStatus[state]).map((state) => [state, byStatus[state]]), ([state]) => state,
      ([state, count]) => h("span", { dataset: { status: state }, title: `${state}: ${count}`, style: { flexGrow: String(count) } }));
    ratio.setAttribute("aria-label", STATES.map((state) => `${byStatus[state]} ${state}`).join(", "));
  }

  function showHealth(own) {
    const rows = own === null ? [["orchestrator", { status: "down", detail: "does not answer" }]]
      : Object.entries(own.subsystems);
    keyed(subsystems, rows, ([name]) => name, ([name, { status, detail }]) =>
      h("li", {}, h("span.dot", { dataset: { health: status } }), h("b", {}, name), h("span.muted", {}, `${status} · ${detail}`)));
  }

  function showFleet(fleet) {
    products.set(fleet.products);
    const { times, states, series } = fleet.history;
    charts.states.set(times, STATES.map((state) => states[state]));
    charts.boot.set(times, [series.boot_p50_ms, series.boot_p95_ms]);
    charts.wake.set(times, [series.wake_p50_ms, series.wake_p95_ms]);
    charts.restarts.set(times, [series.failures, series.restarts]);
    // Drawn over each other: the larger one, behind, is all refusals.
    charts.refused.set(times, [series.refused, series.rate_limited]);
    const rows = [
      ["Provisions", integer(fleet.provisions_1h)], ["Failures", integer(fleet.crashes_1h)],
      ["Restarts", integer(fleet.restarts_1h)], ["Boot p50", duration(fleet.boot_ms.p50)],
      ["Boot p95", duration(fleet.boot_ms.p95)], ["Boot p99", duration(fleet.boot_ms.p99)],
    ];
    keyed(figures, rows, ([name]) => name, ([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
    figures.title = `Backend ${fleet.backend}, deployment ${fleet.deployment}, version ${fleet.version}`;
  }

  function showEvents() {
    const shown = feed.filter((event) => !productId || !event.product_id || event.product_id === productId).slice(0, 12);
    keyed(events, shown, (event) => `${event.product_id ?? ""}/${event.seq}`, (event) => h("li", {},
      h("time.muted", { datetime: event.timestamp, title: ago(event.timestamp) }, clock(event.timestamp)),
      h("code", {}, event.action),
      event.engine_id ? h("a", { href: `#/engines/${event.engine_id}` }, event.user_id ?? "") : h("span", {}, event.user_id ?? ""),
      h("span.space"), event.status ? badge(event.status) : null));
    noEvents.hidden = shown.length > 0;
  }

  return {
    title: "Fleet",
    element,
    refresh,
    onEvent(event) {
      remembered(event);
      showEvents();
    },
    destroy() {
      for (const one of Object.values(charts)) one.destroy();
    },
  };
}

/** Every page passes its events on to this list. */
export function remembered(event) {
  feed.unshift(event);
  feed.length = Math.min(feed.length, 200);
}
