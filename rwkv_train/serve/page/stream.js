// Talking to the server: requests, their errors in one clear line, and streams of events.

import { stored } from "./dom.js";
import { t } from "./words.js";

const ERRORS = {
  401: "error_token",
  403: "error_forbidden",
  413: "error_large",
  503: "error_busy",
  507: "error_disk",
};

/** What went wrong. status: of HTTP, 0 where the server was not reached; its message is one line for people. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let asking = null; // the one dialog that asks for a token, however many requests wait for it
let askForToken = async () => null;

/** How a person is asked for a token: ask(wasWrong) -> token, or null if they gave none. */
export function onToken(ask) {
  askForToken = ask;
}

/** Ask for a token, once for all who need one, and keep it. Returns it, or null. */
export function newToken() {
  asking ??= (async () => {
    const token = await askForToken(Boolean(stored.read("token")));
    if (token) {
      stored.write("token", token);
      dispatchEvent(new Event("token"));
    }
    return token;
  })().finally(() => (asking = null));
  return asking;
}

async function send(method, path, body, signal) {
  const token = stored.read("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    const text = body === undefined ? undefined : JSON.stringify(body);
    return await fetch(path, { method, headers, body: text, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, t("error_unreachable"));
  }
}

async function told(response) {
  let message = "";
  try {
    message = (await response.json()).error?.message ?? "";
  } catch {
    message = response.statusText; // not from our server, as from a proxy before it
  }
  const seconds = response.headers.get("Retry-After");
  if (response.status === 429) return seconds ? t("error_often_seconds", { seconds }) : t("error_often");
  if (ERRORS[response.status]) return t(ERRORS[response.status], { message });
  return response.status >= 500 ? t("error_server", { message }) : t("error_request", { message });
}

/** The response to a request. Asks for a token where the server wants one. Raises ServerError for any other answer. */
export async function request(method, path, body, signal) {
  let response = await send(method, path, body, signal);
  while (response.status === 401 && (await newToken())) response = await send(method, path, body, signal);
  if (!response.ok) throw new ServerError(response.status, await told(response));
  return response;
}

/** The same, read as JSON. */
export async function json(method, path, body, signal) {
  return (await request(method, path, body, signal)).json();
}

/** Events [name, data] of a server-sent stream; ends when the server ends it. Raises ServerError if it breaks. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event) yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, t("error_broke"));
  } finally {
    reader.cancel().catch(() => {}); // already broken: nothing is left to close
  }
}

function parsed(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (!data.length || data[0] === "[DONE]") return null;
  return [name, JSON.parse(data.join("\n"))];
}

/** Resolves after a time, at once if `signal` is aborted. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** Wait before try number `n` (from 0): longer each time, up to half a minute, and not all pages at once. */
export const backoff = (n) => Math.min(30_000, 1000 * 2 ** n) * (0.75 + Math.random() / 2);

/** Resolves when the server can be reached again. */
export async function serverBack() {
  for (let n = 0; ; n++) {
    await pause(backoff(Math.min(n, 3)));
    try {
      return await json("GET", "/health");
    } catch {
      continue;
    }
  }
}
