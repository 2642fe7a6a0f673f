// Calls with the admin key. The key lives in this module's memory only: a reload, or Lock, forgets it.

import { noteServerTime } from "./format.js";

let adminKey = null;
let onRefused = () => {};

// The page may be served below a prefix: everything is relative to where it was loaded from.
const ROOT = new URL(".", new URL(document.baseURI)).href.replace(/\/$/, "");

export class ApiError extends Error {
  constructor(status, code, message, details) {
    super(message);
    Object.assign(this, { status, code, details });
  }
}

export const hasKey = () => adminKey !== null;
export function setKey(key, refused) {
  adminKey = key;
  onRefused = refused;
}
export function forgetKey() {
  adminKey = null;
}

/** The response of a call; raises ApiError when it is not 2xx, or when nobody answers. */
export async function request(method, path, { body, productId, headers = {}, signal } = {}) {
  const sent = { ...headers, "X-Admin-Key": adminKey ?? "" };
  if (productId) sent["X-Product-Id"] = productId;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const options = {
    method, headers: sent, signal, cache: "no-store", credentials: "omit", redirect: "error",
    body: body === undefined ? undefined : JSON.stringify(body),
  };
  let response;
  for (let attempt = 0; response === undefined; attempt += 1) {
    try {
      response = await fetch(ROOT + path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      // A browser gives up what it loads when its network changes; what only asks may ask again.
      if (method !== "GET" || attempt >= 2) throw new ApiError(0, "UNREACHABLE", "The orchestrator does not answer.");
      await new Promise((resolve) => { setTimeout(resolve, 300); });
    }
  }
  noteServerTime(response.headers.get("date"));
  if (response.ok) return response;
  let error = {};
  try {
    ({ error } = await response.json());
  } catch { /* not ours: a proxy on the way */ }
  if (error.code === "INVALID_ADMIN_KEY") onRefused();
  throw new ApiError(response.status, error.code ?? "HTTP_ERROR", error.message ?? `HTTP ${response.status}`, error.details);
}

export async function call(method, path, options) {
  const response = await request(method, path, options);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

export const get = (path, options) => call("GET", path, options);

export async function health() {
  // 503 is an answer, too.
  const response = await fetch(`${ROOT}/health`, { cache: "no-store", credentials: "omit" });
  return response.json();
}

/** The lines of a response as they arrive. */
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield part.replace(/\r$/, "");
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}
