// Corrections as the server has them, and the one that is being learnt as it is learnt.
//
// Only one stream of events is open at a time: a browser opens six connections to a server, for all its tabs together.

import { announce } from "./dom.js";
import { backoff, events, json, pause, request } from "./stream.js";
import { t } from "./words.js";

const known = new Map(); // id -> feedback object
const seen = new Map(); // id -> what its events said: {phase, watch, steps, gate}
const listeners = new Set();
const undoing = new Set(); // ids that are being taken back, which waits for its turn
let model = null; // the profile whose corrections these are; null where none may be taught
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

/** Whether one waits although none is before it: the server gets to know the model first. */
export function waitsForModel(feedback) {
  const [first] = all().filter(unfinished);
  return feedback.status === "waiting" && first === feedback && !all().some(({ status }) => status === "learning");
}

/** Whether one is being taken back. */
export const leaving = (id) => undoing.has(String(id));

/** Whether one can be taken back. */
export const undoable = ({ status }) => ["waiting", "learning", "learnt", "outdated"].includes(status);

/** Those made on the reply of a turn. A server that was restarted knows no replies of theirs; the turn knows ids. */
export function ofReply({ response, user, corrected = [] }) {
  const here = (f) => f.response_id === null && f.question === user && corrected.includes(`${f.model}/${f.id}`);
  return all().filter((f) => response && f.of === null && (f.response_id === response || here(f)));
}

/** What the reply of a turn should have been, if it was corrected and that counts; else null. */
export const rightFor = (turn) => ofReply(turn).findLast((f) => f.kind === "answer" && counts(f))?.answer ?? null;

/** Those that belong to a correction: other ways to ask it, and questions that keep their answers. */
export const belonging = (id) => all().filter((f) => f.of !== null && String(f.of) === String(id));

const at = (path) => `/v1/feedback${path}?model=${encodeURIComponent(model)}`;
const at1 = (id, path = "") => at(`/${encodeURIComponent(id)}${path}`);

/** Speak of the corrections of a profile from now on; null for none. Raises ServerError. */
export async function use(profile) {
  if (profile !== model) {
    model = profile;
    known.clear();
    seen.clear();
    following?.abort();
    following = null;
  }
  await refresh();
}

/** Read them all again, and follow what is not finished. Raises ServerError. */
export async function refresh() {
  const asked = model;
  const { data } = model === null ? { data: [] } : await json("GET", at(""));
  if (asked !== model) return;
  const open = all().filter(unfinished);
  known.clear();
  for (const feedback of data) known.set(String(feedback.id), feedback);
  behind = false;
  tell(null);
  open.forEach(({ id }) => over(get(id)));
  follow();
}

/** Send one; returns it as received. Raises ServerError. */
export async function submit(body) {
  const feedback = await json("POST", "/v1/feedback", { ...body, model });
  known.set(String(feedback.id), feedback);
  announce(t("received_said"));
  tell(null);
  over(feedback);
  follow();
  return feedback;
}

/** Say what became of one that is over, and read how it went if nobody watched. */
function over(feedback) {
  if (!feedback || unfinished(feedback) || feedback.status === "undone") return;
  announce(t(`said_${feedback.status}`, { answer: feedback.outcome?.answer_after ?? "" }));
  if (!progress(feedback.id).steps.length) replay(feedback.id);
}

/** Take one back; returns the ids that went with it. Raises ServerError. */
export async function undo(id) {
  undoing.add(String(id));
  tell(id);
  try {
    const { undone } = await json("DELETE", at1(id));
    announce(t("undone_said"));
    return undone;
  } finally {
    undoing.delete(String(id));
    await refresh();
  }
}

/** Learn all together; resolves when that is done. Raises ServerError. */
export async function sleep() {
  const controller = new AbortController();
  try {
    const stream = events(await request("GET", at("/events"), undefined, controller.signal));
    await json("POST", at("/sleep"));
    for await (const [name, data] of stream) if (name === "slept") return data;
  } finally {
    controller.abort();
    await refresh();
  }
}

/** All as training data, a Blob. Raises ServerError. */
export const exported = async () => (await request("GET", at("/export"))).blob();

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
        const ended = next.status === "waiting" ? await turnOf(next, signal) : await watch(next, signal);
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

/** Wait until it is the turn of one, as all events tell; returns whether they told anything. */
async function turnOf(feedback, signal) {
  const id = String(feedback.id);
  const controller = new AbortController();
  signal.addEventListener("abort", () => controller.abort(), { once: true });
  try {
    const stream = events(await request("GET", at("/events"), undefined, controller.signal));
    behind = true;
    const { status } = await json("GET", at1(id), undefined, signal); // it may have begun before the stream did
    if (status !== "waiting") return true;
    for await (const [name, data] of stream) {
      if (name !== "watch") return true;
      seen.set(id, { ...nothing(), phase: "preparing", watch: data }); // the model is got to know before the first one
      tell(id);
    }
    return false;
  } finally {
    controller.abort();
  }
}

/** Read the events of one from the beginning; returns whether they came to their end. */
async function watch(feedback, signal) {
  const id = String(feedback.id);
  const quiet = !unfinished(feedback);
  const stream = events(await request("GET", at1(id, "/events"), undefined, signal));
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
  over(get(id));
  behind = true; // others may be outdated by it
  tell(null);
  return true;
}
