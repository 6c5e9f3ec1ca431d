// Speaks to the server: requests with the API key, errors as one line, server-sent events, and the socket.

import { $ } from "./dom.js";

const KEY = "nova.key";
const KEY_PROTOCOL = "openai-insecure-api-key.";

export class ApiError extends Error {
  constructor(message, status, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export function setKey(key) {
  if (key) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

const headersWithKey = () => (localStorage.getItem(KEY) ? { authorization: `Bearer ${localStorage.getItem(KEY)}` } : {});

/** One request. It waits for a key if the server wants one, and throws an ApiError for every other refusal. */
export async function call(path, { method = "GET", json, form, signal } = {}) {
  const headers = headersWithKey();
  if (json !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: json === undefined ? form : JSON.stringify(json), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    await askForKey();
    return call(path, { method, json, form, signal });
  }
  throw await errorOf(answer);
}

async function errorOf(answer) {
  const text = await answer.text();
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // a proxy's page is no JSON
  }
  let message = error.message ?? `The server answered ${answer.status} ${answer.statusText}`;
  const wait = answer.headers.get("retry-after");
  if (answer.status === 429 && wait) message += ` (try again in ${wait} s)`;
  return new ApiError(message, answer.status, error.param);
}

export const getJson = async (path, options) => (await call(path, options)).json();
export const getBlob = async (path, options) => (await call(path, options)).blob();

let asked = null;

/** Opens the dialog for the key; all requests that wait go on with the one that is given. */
export function askForKey() {
  asked ??= new Promise((resolve) => {
    const dialog = $("key");
    $("key-open").hidden = false;
    $("key-field").value = "";
    dialog.addEventListener("close", () => {
      setKey($("key-field").value.trim());
      asked = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asked;
}

/** Yields the events of a stream of server-sent events as {type, data}. */
export async function* events(path, options) {
  const answer = await call(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r", "");
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const found = parseEvent(part);
        if (found) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(part) {
  let type = "message";
  const lines = [];
  for (const line of part.split("\n")) {
    if (line.startsWith("event:")) type = line.slice(6).trim();
    if (line.startsWith("data:")) lines.push(line.slice(5).trimStart());
  }
  const text = lines.join("\n");
  if (!text || text === "[DONE]") return null;
  return { type, data: JSON.parse(text) };
}

/** A socket; browsers send no headers with one, so that the key goes as a subprotocol. */
export function socket(path) {
  const key = localStorage.getItem(KEY);
  const url = new URL(path, location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const found = new WebSocket(url, key ? ["realtime", KEY_PROTOCOL + key] : []);
  found.binaryType = "arraybuffer";
  return found;
}
