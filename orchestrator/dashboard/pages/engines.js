// All engines: searched, filtered, sorted and paged by the server, so that ten thousand are as quick as ten.

import { get } from "../api.js";
import { badge, h, keyed } from "../dom.js";
import { ago, integer, when } from "../format.js";
import { STATES, productSelect } from "./shared.js";
import { remembered } from "./overview.js";

const PAGE = 50;
const COLUMNS = [
  ["User", "user_id"], ["State", "status"], ["Product", "product"], ["Image", null], ["Last healthy", "last_health_at"],
  ["Created", "created_at"],
];

export function enginesPage(params) {
  const asked = {
    search: params.get("search") ?? "", status: params.get("status") ?? "", product_id: params.get("product") ?? "",
    sort: params.get("sort") ?? "-created_at", offset: Number(params.get("offset")) || 0,
  };
  let generation = 0;
  let typing = null;

  const search = h("input", {
    type: "search", placeholder: "User, engine id or image", "aria-label": "Search engines", value: asked.search,
    autocomplete: "off", spellcheck: false, maxlength: "256", oninput: () => {
      clearTimeout(typing);
      typing = setTimeout(() => change({ search: search.value }), 150);
    },
  });
  search.value = asked.search;
  const chips = h("div.segments.chips", { role: "group", "aria-label": "State" });
  const products = productSelect(() => asked.product_id, (value) => change({ product_id: value }));
  const headings = h("tr");
  const body = h("tbody");
  const empty = h("p.empty", { hidden: true }, "No engine matches.");
  const range = h("span.muted", { role: "status" });
  const previous = h("button", { type: "button", dataset: { previous: "" }, onclick: () => turn(-PAGE) }, "Previous");
  const next = h("button", { type: "button", dataset: { next: "" }, onclick: () => turn(PAGE) }, "Next");

  const element = h("div.page", {},
    h("div.head", {}, h("h1", {}, "Engines"), h("span.space"), search, products.element),
    chips,
    h("section.card.table", { "aria-label": "Engines" }, h("table", {}, h("thead", {}, headings), body), empty),
    h("div.pager", {}, range, h("span.space"), previous, next));

  function remember() {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(asked)) {
      if (value && !(name === "sort" && value === "-created_at")) query.set(name === "product_id" ? "product" : name, value);
    }
    history.replaceState(null, "", `#/engines${query.size ? `?${query}` : ""}`);
  }

  function change(changes) {
    Object.assign(asked, { offset: 0 }, changes);
    remember();
    return refresh();
  }

  function turn(by) {
    change({ offset: Math.max(0, asked.offset + by) });
    element.scrollIntoView();
  }

  async function refresh() {
    const mine = ++generation;
    const query = new URLSearchParams({ limit: PAGE, offset: asked.offset, sort: asked.sort });
    for (const name of ["search", "status", "product_id"]) if (asked[name]) query.set(name, asked[name]);
    const found = await get(`/dashboard/data/engines?${query}`);
    if (mine !== generation) return; // a newer question is under way
    if (found.total > 0 && asked.offset >= found.total) {
      change({ offset: Math.floor((found.total - 1) / PAGE) * PAGE });
      return;
    }
    showChips(found.by_status);
    showHeadings();
    // The texts of ages are part of what is compared, so that they go on.
    const rows = found.engines.map((one) => ({ ...one, healthy: ago(one.last_health_at), made: ago(one.created_at) }));
    keyed(body, rows, (one) => one.engine_id, row);
    empty.hidden = found.total > 0;
    const last = Math.min(asked.offset + PAGE, found.total);
    range.textContent = found.total ? `${integer(asked.offset + 1)}–${integer(last)} of ${integer(found.total)}` : "";
    previous.disabled = asked.offset === 0;
    next.disabled = last >= found.total;
    element.dataset.shown = `${asked.search}|${asked.status}|${asked.offset}`;
  }

  const row = (one) => h("tr", { tabindex: "0", dataset: { row: "" }, onclick: go(one), onkeydown: (event) => {
    if (event.key === "Enter") go(one)(event);
  } },
  h("td", { dataset: { label: "User" } }, h("a", { href: `#/engines/${one.engine_id}`, tabindex: "-1" }, one.user_id)),
  h("td", { dataset: { label: "State" } }, badge(one.status),
    one.operation ? h("small.muted", {}, ` ${one.operation}`) : null,
    one.error_code ? h("small.muted", {}, ` ${one.error_code}`) : null),
  h("td", { dataset: { label: "Product" } }, one.product),
  h("td", { dataset: { label: "Image" } }, h("code", {}, one.engine_version)),
  h("td", { dataset: { label: "Last healthy" }, title: when(one.last_health_at) }, one.healthy),
  h("td", { dataset: { label: "Created" }, title: when(one.created_at) }, one.made));

  const go = (one) => (event) => {
    if (event.target.closest("button") || getSelection().toString()) return;
    location.hash = `#/engines/${one.engine_id}`;
  };

  function showChips(byStatus) {
    const all = STATES.reduce((sum, state) => sum + byStatus[state], 0);
    keyed(chips, [["", all, asked.status], ...STATES.map((state) => [state, byStatus[state], asked.status])],
      ([state]) => state || "all", ([state, count, chosen]) => h("button", {
        type: "button", "aria-pressed": String(state === chosen), onclick: () => change({ status: state }),
      }, state ? badge(state) : h("span.badge.plain", {}, "all"), h("span.count", {}, integer(count))));
  }

  function showHeadings() {
    keyed(headings, COLUMNS.map(([label, name]) => [label, name, asked.sort]), ([label]) => label, ([label, name, sort]) => {
      const direction = sort === name ? "ascending" : sort === `-${name}` ? "descending" : null;
      return h("th", { scope: "col", "aria-sort": direction }, name === null ? label : h("button.sort", {
        type: "button", dataset: { place: "sort" }, onclick: () => change({ sort: sort === name ? `-${name}` : name }),
      }, label, direction ? h("span", { "aria-hidden": "true" }, direction === "ascending" ? " ↑" : " ↓") : null));
    });
  }

  get("/dashboard/data/products").then((found) => products.set(found.products)).catch(() => {});

  return {
    title: "Engines",
    element,
    refresh,
    onEvent: remembered,
    focus: () => search.focus({ preventScroll: true }),
    destroy: () => clearTimeout(typing),
  };
}
