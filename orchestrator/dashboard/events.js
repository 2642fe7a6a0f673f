// The audit as it happens: /events read with fetch, since an EventSource cannot send the admin key.

import { lines, request } from "./api.js";

const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 30000;
const POLL_MS = 5000;

/**
 * Calls `onEvent(event)` for each event and `onState("live" | "reconnecting" | "polling")`, until `stop()`.
 * Goes on after the last id that it saw. Where there is no stream, `onEvent(null)` every five seconds.
 */
export function follow({ onEvent, onState }) {
  const abort = new AbortController();
  let lastId = null;
  let delayMs = FIRST_DELAY_MS;

  async function read() {
    const headers = { Accept: "text/event-stream" };
    if (lastId !== null) headers["Last-Event-ID"] = lastId;
    const response = await request("GET", "/events", { headers, signal: abort.signal });
    onState("live");
    if (lastId !== null) onEvent(null); // what may have happened while nobody listened
    let data = [];
    let id = null;
    for await (const line of lines(response)) {
      delayMs = FIRST_DELAY_MS;
      if (line === "") {
        if (id !== null) lastId = id;
        if (data.length) {
          let event = null;
          try { event = JSON.parse(data.join("\n")); } catch { /* not ours */ }
          if (event) onEvent(event);
        }
        data = [];
        id = null;
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue;
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "data") data.push(value);
      else if (field === "id") id = value;
    }
  }

  const wait = (ms) => new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    abort.signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });

  (async () => {
    while (!abort.signal.aborted) {
      try {
        await read();
      } catch (error) {
        if (abort.signal.aborted) return;
        if (error.status === 401) return;
        if (error.status === 404) {
          onState("polling");
          onEvent(null);
          await wait(POLL_MS);
          continue;
        }
      }
      if (abort.signal.aborted) return;
      onState("reconnecting");
      await wait(delayMs * (0.75 + Math.random() / 2));
      delayMs = Math.min(delayMs * 2, LONGEST_DELAY_MS);
    }
  })();

  return () => abort.abort();
}
