// Corrections as the server has them, and the one that is being learnt as it is learnt.
//
// Only one stream of events is open at a time, since a browser opens six connections to a server, for all tabs together.

import { announce } from "./dom.js";
import { backoff, events, json, pause, request } from "./stream.js";
import { t } from "./words.js";

const known = new Map(); // id -> feedback object
const seen = new Map(); // id -> what its events said: {phase, watch, steps, gate}
const listeners = new Set();
let following = null; // AbortController while a stream is open
let behind = true; // whether the list was never read, or events may have been missed

export const unfinished = ({ status }) => status === "waiting" || status === "learning";
/** Whether it counts: learnt, or on its way there. */
export const counts = ({ status }) => status === "learnt" || status === "waiting" || status === "learning";

/** changed(id) is called after something about a correction changed; null for anything about all. */
export function onChange(changed) {
  listeners.add(changed);
}

const tell = (id) => listeners.forEach((changed) => changed(id));

/** All, oldest first. */
export const all = () => [...known.values()];

export const get = (id) => known.get(String(id));

/** What the events said of one: {phase: received|preparing|learning|checked, watch, steps: [{step, loss}], gate}. */
export const progress = (id) => seen.get(String(id)) ?? nothing();

const nothing = () => ({ phase: "received", watch: null, steps: [], gate: null });

/** Those that were made on a reply, not counting what belongs to another one. */
export const ofReply = (response) => all().filter((f) => response && f.response_id === response && !f.of);

/** Those that belong to a correction: other ways to ask it, and questions that keep their answers. */
export const belonging = (id) => all().filter((f) => f.of !== null && String(f.of) === String(id));

/** Read them all again, and follow what is not finished. Raises ServerError. */
export async function refresh() {
  const { data } = await json("GET", "/v1/feedback");
  known.clear();
  for (const feedback of data) known.set(String(feedback.id), feedback);
  behind = false;
  tell(null);
  follow();
}

/** Send one; returns it as received. Raises ServerError. */
export async function submit(body) {
  const feedback = await json("POST", "/v1/feedback", body);
  known.set(String(feedback.id), feedback);
  announce(t("received_said"));
  tell(null);
  follow();
  return feedback;
}

/** Take one back; returns the ids that went with it. Raises ServerError. */
export async function undo(id) {
  const { undone } = await json("DELETE", `/v1/feedback/${encodeURIComponent(id)}`);
  announce(t("undone_said"));
  await refresh();
  return undone;
}

/** Learn all together; resolves when that is done. Raises ServerError. */
export async function sleep() {
  const controller = new AbortController();
  try {
    const stream = events(await request("GET", "/v1/feedback/events", undefined, controller.signal));
    await json("POST", "/v1/feedback/sleep");
    for await (const [name, data] of stream) if (name === "slept") return data;
  } finally {
    controller.abort();
    await refresh();
  }
}

/** Read the events of a finished one again, for its curve. The server may have forgotten them; then nothing changes. */
export async function replay(id) {
  try {
    await watch(get(id), AbortSignal.timeout(10_000));
  } catch {
    // the curve is an extra; what became of the correction stands without it
  }
}

/** Follow what is not finished, one after the other, until all is. */
export async function follow() {
  if (following || document.hidden) return;
  const controller = (following = new AbortController());
  const { signal } = controller;
  try {
    for (let failures = 0; !signal.aborted; ) {
      try {
        if (behind) await refresh();
        const next = all().find((f) => f.status === "learning") ?? all().find((f) => f.status === "waiting");
        if (!next) return;
        const ended = await watch(next, signal);
        if (!ended) behind = true; // the stream ended early: see what became of it, a little later
        failures = ended ? 0 : failures + 1;
      } catch (error) {
        if (error.name === "AbortError" || error.status === 401) return;
        behind = true;
        failures += 1;
      }
      if (failures) await pause(backoff(failures - 1), signal);
    }
  } finally {
    if (following === controller) following = null;
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    following?.abort(); // leaves its connection to the tab that is looked at
    following = null;
    return;
  }
  behind = true;
  follow();
});

/** Read the events of one from the beginning; returns whether they came to their end. */
async function watch(feedback, signal) {
  const id = String(feedback.id);
  const quiet = !unfinished(feedback);
  const stream = events(await request("GET", `/v1/feedback/${encodeURIComponent(id)}/events`, undefined, signal));
  const now = nothing();
  for await (const [name, data] of stream) {
    seen.set(id, now);
    took(now, name, data);
    if (name === "done") return finish(id, data, quiet);
    const current = known.get(id);
    if (current?.status === "waiting" && name !== "received") current.status = "learning";
    tell(id);
  }
  return false;
}

function took(now, name, data) {
  if (name === "watch") {
    if (now.phase === "received") now.phase = "preparing";
    now.watch = data;
  } else if (name === "step") {
    now.phase = "learning";
    now.steps.push({ step: data.step, loss: data.loss });
  } else if (name === "gate") {
    now.phase = "checked";
    now.gate = data;
  }
}

async function finish(id, data, quiet) {
  const feedback = data.feedback ?? data;
  if (feedback.object === "feedback") known.set(id, feedback);
  if (quiet) {
    tell(id);
    return true;
  }
  announce(t(`said_${get(id).status}`, { answer: get(id).outcome?.answer_after ?? "" }));
  behind = true; // others may be outdated by it
  tell(null);
  return true;
}
