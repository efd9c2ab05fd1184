// The room's WebSocket, which comes back by itself.

import { stored } from "./dom.js";
import { backoff, newToken, pause } from "./stream.js";

const WRONG_TOKEN = 4401;
const TOO_FAST = 4429;
const TOO_FAST_WAIT = 30_000;

/**
 * A connection that says hello and is opened again whenever it is lost.
 *
 * heard(message) gets what the server sends; state(name, seconds) is told connecting, connected, lost, fast or token,
 * and in how many seconds it is tried again. Returns {send(message) -> whether it went, now(): connect afresh at once,
 * tell(): the state again}.
 */
export function connection(heard, state) {
  let socket = null;
  let failures = 0;
  let waiting = null; // AbortController of the wait before the next try
  let last = ["connecting", 0];

  const tell = (name, seconds = 0) => {
    last = [name, seconds];
    state(name, seconds);
  };

  const now = () => {
    waiting?.abort();
    waiting = null;
    const before = socket;
    socket = null; // its close is no loss
    before?.close();
    const fresh = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/room/ws`);
    socket = fresh;
    tell("connecting");
    fresh.addEventListener("open", () => {
      const hello = { type: "hello", token: stored.read("token"), name: stored.read("name") ?? "" };
      fresh.send(JSON.stringify(hello));
    });
    fresh.addEventListener("message", ({ data }) => {
      if (fresh !== socket) return;
      const message = JSON.parse(data);
      if (message.type === "welcome") {
        failures = 0;
        tell("connected");
      }
      heard(message);
    });
    fresh.addEventListener("close", ({ code }) => fresh === socket && lost(code));
  };

  async function lost(code) {
    socket = null;
    if (code === WRONG_TOKEN) {
      tell("token");
      if (await newToken()) now();
      return;
    }
    const time = code === TOO_FAST ? TOO_FAST_WAIT : backoff(failures);
    failures += 1;
    const mine = (waiting = new AbortController());
    for (let left = Math.ceil(time / 1000); left > 0 && !mine.signal.aborted; left--) {
      tell(code === TOO_FAST ? "fast" : "lost", left);
      await pause(1000, mine.signal);
    }
    if (!mine.signal.aborted) now();
  }

  return {
    now,
    tell: () => state(...last),
    send(message) {
      if (socket?.readyState !== WebSocket.OPEN || last[0] !== "connected") return false;
      socket.send(JSON.stringify(message));
      return true;
    },
  };
}
