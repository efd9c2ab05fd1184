// Asking the model: a message is sent, its reply comes in pieces, and whatever breaks it off leaves what was shown.

import { rightFor } from "./corrections.js";
import { stored } from "./dom.js";
import { add, children, drop, messages, ROOT, save, upTo } from "./store.js";
import { events, json, pause, request } from "./stream.js";
import { t } from "./words.js";

const KEEP_EVERY = 700; // ms between writes of a reply that is coming in
const SETTLE_TRIES = 8; // times that the server is asked whether a reply has ended
const runs = new Map(); // turn id -> {controller, done} of the replies that this page is reading
const settling = new Set(); // ids of turns whose end the server is being asked for

/** Whether the server is being asked how the reply of a turn ended. */
export const unsettled = (turn) => settling.has(turn.id);

export const running = (turn) => runs.has(turn.id);

/** The turn of a conversation whose reply is coming in, if any. */
export const runningIn = (conversation) => Object.values(conversation.turns).find(running);

/** Break off a reply; resolves when all that was shown is kept. */
export async function stop(turn) {
  const run = runs.get(turn.id);
  if (!run) return;
  turn.status = "stopped";
  run.controller.abort();
  await run.done;
}

/**
 * Send `text` after the turn `parent`. Resolves when the reply is there or broken off, to the turn.
 *
 * began(turn) is called once the server has taken it, piece(turn) after every piece of text, changed() when turns came
 * or went. Where the server does not take it, there is no turn, and ServerError is raised.
 */
export async function ask(conversation, parent, text, model, { began, piece, changed }) {
  const shownBefore = conversation.shown[parent];
  const turn = add(conversation, parent, text);
  const controller = new AbortController();
  let ended;
  runs.set(turn.id, { controller, done: new Promise((resolve) => (ended = resolve)) });
  changed();
  try {
    const response = await begin(conversation, turn, model, controller.signal);
    await read(conversation, turn, response, began, piece);
  } catch (error) {
    if (!turn.response) {
      drop(conversation, turn, shownBefore);
      if (error.name !== "AbortError") throw error;
      return null;
    }
    if (error.name !== "AbortError") turn.why = error.message;
    if (turn.status === "streaming") turn.status = "incomplete";
    await settle(conversation, turn);
  } finally {
    if (turn.response) save(conversation);
    runs.delete(turn.id);
    changed();
    ended();
  }
  return turn;
}

async function begin(conversation, turn, model, signal) {
  const before = conversation.turns[turn.parent]?.response ?? null;
  const { instructions, ...sampling } = stored.readJson("sampling", {});
  const body = { input: turn.user, stream: true, store: true, ...sampling };
  if (model) body.model = model;
  if (instructions && turn.parent === ROOT) body.instructions = instructions;
  if (turn.parent === ROOT) return request("POST", "/v1/responses", body, signal);
  const turns = upTo(conversation, turn.parent);
  const corrected = turns.some((each) => rightFor(each) !== null); // it goes on from what is shown
  try {
    if (before && !corrected) return await request("POST", "/v1/responses", { ...body, previous_response_id: before }, signal);
  } catch (error) {
    if (error.status !== 404) throw error;
  }
  // The server does not have what was said before, so it is sent; what of it was sent before is not read again.
  const input = [...messages(turns, (each) => rightFor(each) ?? each.reply), { role: "user", content: turn.user }];
  return request("POST", "/v1/responses", { ...body, instructions, input }, signal);
}

async function read(conversation, turn, response, began, piece) {
  let kept = performance.now();
  for await (const [name, data] of events(response)) {
    if (!turn.response && data.response?.id) {
      turn.response = data.response.id;
      save(conversation);
      began(turn);
    }
    if (name === "response.output_text.delta") {
      turn.reply += data.delta;
      piece(turn);
      if (performance.now() - kept > KEEP_EVERY) {
        kept = performance.now();
        save(conversation);
      }
    } else if (["response.completed", "response.incomplete", "response.failed"].includes(name)) {
      took(turn, data.response);
      return;
    } else if (name === "error") {
      throw new Error(data.message ?? data.error?.message ?? t("error_broke"));
    }
  }
  throw new Error(t("error_broke"));
}

/** The text of a response object. */
const textOf = (object) =>
  (object.output ?? [])
    .flatMap((item) => item.content ?? [])
    .filter(({ type }) => type === "output_text")
    .map(({ text }) => text)
    .join("");

function took(turn, object) {
  turn.reply = textOf(object) || turn.reply;
  if (object.status === "completed") turn.status = "completed";
  else if (object.status === "failed") {
    turn.status = "failed";
    turn.why = object.error?.message ?? "";
  } else if (object.incomplete_details?.reason === "max_output_tokens") turn.status = "limit";
  else if (turn.status !== "stopped") turn.status = "incomplete";
}

/** Ask the server how a reply ended that this page no longer reads. Where it cannot say, what was shown stays. */
export async function settle(conversation, turn) {
  settling.add(turn.id);
  try {
    for (let n = 0; n < SETTLE_TRIES; n++) {
      const object = await json("GET", `/v1/responses/${encodeURIComponent(turn.response)}`);
      if (object.status !== "in_progress" && object.status !== "queued") {
        took(turn, object);
        break;
      }
      turn.reply = textOf(object) || turn.reply;
      await pause(150 * 2 ** n);
    }
  } catch (error) {
    if (error.status === 404) turn.status = turn.status === "stopped" ? "stopped" : "incomplete";
  } finally {
    settling.delete(turn.id);
  }
  save(conversation);
}

/** Settle all replies of a conversation that were coming in when the page was left. */
export async function settleAll(conversation, changed) {
  const open = (turn) => turn.status === "streaming" && !running(turn) && !unsettled(turn);
  const left = Object.values(conversation.turns).filter((turn) => open(turn));
  for (const turn of left) {
    const settled = settle(conversation, turn);
    changed();
    await settled;
    changed();
  }
}

/** Forget a conversation on the server too, as far as it can be reached. */
export function forget(conversation) {
  for (const { response } of Object.values(conversation.turns)) {
    if (response) request("DELETE", `/v1/responses/${encodeURIComponent(response)}`).catch(() => {}); // gone already
  }
}

/** The last turn that stands at an end of the tree, where a message goes that is typed now. */
export const siblings = (conversation, turn) => children(conversation, turn.parent);
