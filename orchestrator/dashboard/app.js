// The frame: the key, the pages, the keyboard, and one stream of events for whichever page is shown.

import { forgetKey, get, hasKey, setKey } from "./api.js";
import { recolour } from "./chart.js";
import { inform } from "./dialog.js";
import { h, note } from "./dom.js";
import { follow } from "./events.js";
import { enginePage } from "./pages/engine.js";
import { enginesPage } from "./pages/engines.js";
import { overviewPage } from "./pages/overview.js";
import { forgetKeys, productsPage } from "./pages/products.js";

const main = document.getElementById("main");
const bar = document.querySelector("header.bar");
const live = document.getElementById("live");
let page = null;
let stopEvents = null;

// --- pages ------------------------------------------------------------------------------------------------

function route() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  const params = new URLSearchParams(query);
  if (parts[0] === "engines" && parts[1]) return ["engines", () => enginePage(parts[1])];
  if (parts[0] === "engines") return ["engines", () => enginesPage(params)];
  if (parts[0] === "products") return ["products", () => productsPage(parts[1] ?? null)];
  return ["overview", () => overviewPage(params)];
}

function show() {
  if (!hasKey()) return;
  const [name, make] = route();
  page?.destroy?.();
  page = make();
  main.replaceChildren(page.element);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${page.title} · Orchestrator`;
  page.focus?.();
  refresh();
}

// A page is asked to refresh at most once at a time; what arrives meanwhile is one more refresh.
let refreshing = false;
let again = false;
async function refresh(event = null) {
  if (refreshing) {
    again = true;
    return;
  }
  refreshing = true;
  const shown = page;
  try {
    await shown.refresh(event);
    if (shown === page) main.dataset.ready = "true";
  } catch (error) {
    if (shown === page && hasKey()) failed(error);
  } finally {
    refreshing = false;
  }
  if (again || shown !== page) {
    again = false;
    if (hasKey()) refresh();
  }
}

let toldProblem = null;
function failed(error) {
  if (toldProblem === error.code) return; // said once, not with every event
  toldProblem = error.code;
  setTimeout(() => { toldProblem = null; }, 10000);
  note(error.message, "error");
}

// Many events in a row are one refresh; none while nobody looks.
let due = null;
function soon() {
  if (due !== null || document.hidden) return;
  due = setTimeout(() => { due = null; if (page) refresh(); }, 400);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && hasKey()) soon(); });
setInterval(() => { if (hasKey()) soon(); }, 15000); // what is no event: probes, states on the way

// --- the key ----------------------------------------------------------------------------------------------

function lock(reason = null) {
  forgetKey();
  forgetKeys();
  stopEvents?.();
  stopEvents = null;
  page?.destroy?.();
  page = null;
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  bar.hidden = true;
  document.title = "Orchestrator";
  delete main.dataset.ready;
  const problem = h("p.problem", { role: "alert", hidden: reason === null }, reason ?? "");
  const input = h("input", {
    id: "key", type: "password", autocomplete: "off", spellcheck: false, required: true, placeholder: "Admin key",
    "aria-label": "Admin key",
  });
  const go = h("button.primary", { type: "submit" }, "Open");
  const form = h("form.card.login", { onsubmit: open },
    h("img", { src: document.querySelector(".brand img").src, width: 40, height: 40, alt: "" }),
    h("h1", {}, "Orchestrator"),
    h("p.muted", {}, "The key stays in the memory of this page. Reloading or locking forgets it."),
    input, problem, go);
  async function open(event) {
    event.preventDefault();
    const key = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) {
      problem.textContent = "This cannot be an admin key: it has characters that a header cannot carry.";
      problem.hidden = false;
      return;
    }
    go.disabled = true;
    setKey(key, () => {});
    try {
      await get("/dashboard/data/engines?limit=1");
    } catch (error) {
      forgetKey();
      problem.textContent = error.code === "INVALID_ADMIN_KEY" ? "This is not an admin key of this orchestrator." : error.message;
      problem.hidden = false;
      go.disabled = false;
      input.select();
      return;
    }
    setKey(key, () => lock("The key is not valid any more."));
    input.value = "";
    unlocked();
  }
  main.replaceChildren(form);
  input.focus();
}

function unlocked() {
  bar.hidden = false;
  stopEvents = follow({
    onEvent(event) {
      if (event) page?.onEvent?.(event);
      soon();
    },
    onState(state) {
      live.dataset.state = state;
      live.textContent = state;
      live.title = {
        live: "Changes are shown as they happen.",
        polling: "This orchestrator has no event stream; the page asks every few seconds.",
        reconnecting: "The event stream is interrupted; it goes on where it stopped.",
      }[state] ?? "";
    },
  });
  show();
}

// --- dark and light ---------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme(chosen) {
  if (chosen) document.documentElement.dataset.theme = chosen;
  document.getElementById("theme").textContent = isDark() ? "☀" : "☾";
  recolour();
}
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
dark.addEventListener("change", () => theme(null));

// --- the keyboard -----------------------------------------------------------------------------------------

const KEYS = [
  ["g o", "Overview"], ["g e", "Engines"], ["g p", "Products"], ["/", "Search"], ["j k", "Next, previous row"],
  ["Enter", "Open the row"], ["n p", "Next, previous page of a list"], ["r", "Refresh"], ["t", "Dark or light"],
  ["Esc", "Leave the search, close a dialog"], ["?", "This list"],
];

function showKeys() {
  inform("Keyboard", h("dl.keys", {}, KEYS.map(([key, what]) => [
    h("dt", {}, key.split(" ").map((one) => h("kbd", {}, one))), h("dd", {}, what),
  ])));
}

let pendingG = false;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !hasKey() || document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input, textarea, select");
  if (typing) {
    if (event.key === "Escape") {
      event.preventDefault(); // a search field would be emptied
      event.target.blur();
    }
    return;
  }
  const afterG = pendingG;
  pendingG = event.key === "g" && !afterG;
  if (afterG && { o: 1, e: 1, p: 1 }[event.key]) {
    location.hash = { o: "#/", e: "#/engines", p: "#/products" }[event.key];
  } else if (event.key === "/") {
    const search = main.querySelector("input[type=search]");
    if (search) search.focus();
    else location.hash = "#/engines";
  } else if (event.key === "j" || event.key === "k") {
    const rows = [...main.querySelectorAll("[data-row]")];
    const now = rows.indexOf(document.activeElement.closest("[data-row]"));
    rows[Math.min(Math.max(now + (event.key === "j" ? 1 : -1), 0), rows.length - 1)]?.focus();
  } else if (event.key === "n" || event.key === "p") {
    main.querySelector(event.key === "n" ? "[data-next]" : "[data-previous]")?.click();
  } else if (event.key === "r") {
    refresh();
  } else if (event.key === "t") {
    theme(isDark() ? "light" : "dark");
  } else if (event.key === "?") {
    showKeys();
  } else {
    return;
  }
  event.preventDefault();
});

document.getElementById("lock").addEventListener("click", () => lock());
document.getElementById("help").addEventListener("click", showKeys);
document.getElementById("theme").addEventListener("click", () => theme(isDark() ? "light" : "dark"));
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
addEventListener("hashchange", show);
theme(null);
lock();
