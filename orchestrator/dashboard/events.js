// The audit as it happens: /events read with fetch, since an EventSource cannot send the admin key.

import { lines, request } from "./api.js";

const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 30000;
const POLL_MS = 5000;
const SILENCE_MS = 45000; // the server gives a sign of life every 15 s

/**
 * Calls `onEvent(event)` for each event and `onState("live" | "reconnecting" | "polling")`, until `stop()`.
 * Goes on after the last id that it saw, also when a connection is dead and nobody says so: after a laptop's sleep, or
 * a change of network. Where there is no stream, `onEvent(null)` every five seconds.
 */
export function follow({ onEvent, onState }) {
  let stopped = false;
  let connection = new AbortController();
  let watchdog = null;
  let endWait = () => {};
  let lastId = null;
  let delayMs = FIRST_DELAY_MS;

  async function read() {
    const headers = { Accept: "text/event-stream" };
    if (lastId !== null) headers["Last-Event-ID"] = lastId;
    connection = new AbortController();
    expectMore();
    const response = await request("GET", "/events", { headers, signal: connection.signal });
    onState("live");
    if (lastId !== null) onEvent(null); // what may have happened while nobody listened
    let data = [];
    let id = null;
    for await (const line of lines(response)) {
      expectMore();
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

  function expectMore() {
    clearTimeout(watchdog);
    watchdog = setTimeout(cut, SILENCE_MS);
  }

  const wait = (ms) => new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    endWait = () => { clearTimeout(timer); resolve(); };
  });

  function cut() {
    connection.abort();
  }

  function tryNow() {
    delayMs = FIRST_DELAY_MS;
    endWait();
  }

  window.addEventListener("offline", cut);
  window.addEventListener("online", tryNow);

  (async () => {
    while (!stopped) {
      try {
        await read();
      } catch (error) {
        if (stopped || error.status === 401) return;
        if (error.status === 404) {
          onState("polling");
          onEvent(null);
          await wait(POLL_MS);
          continue;
        }
      } finally {
        clearTimeout(watchdog);
      }
      if (stopped) return;
      onState("reconnecting");
      await wait(delayMs * (0.75 + Math.random() / 2));
      delayMs = Math.min(delayMs * 2, LONGEST_DELAY_MS);
    }
  })();

  return () => {
    stopped = true;
    window.removeEventListener("offline", cut);
    window.removeEventListener("online", tryNow);
    cut();
    endWait();
  };
}
