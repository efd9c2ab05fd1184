// Conversations, kept in the browser. A conversation is a tree: a turn is a message with its reply, its parent the turn
// before. Editing a message, or asking again, adds a sibling; `shown` says which child of a turn is looked at.
//
// turn: {id, parent, user, reply, response (the server's id), status, why}
// status: streaming, completed, stopped (by the person), incomplete (broken off), limit (as long as allowed), failed

import { stored } from "./dom.js";

export const ROOT = "root";
const TITLE = 60; // characters of the first message that name a conversation
const opened = new Map(); // one object for each conversation, however often it is opened

const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

/** A conversation without turns; it is kept from its first turn on. */
export function fresh(id = newId()) {
  const conversation = { id, title: "", created: Date.now(), used: Date.now(), turns: {}, shown: {} };
  opened.set(id, conversation);
  return conversation;
}

/** A conversation by its id; null if there is none. */
export function open(id) {
  if (!opened.has(id)) {
    const found = stored.readJson(`conversation.${id}`, null);
    if (!found) return null;
    opened.set(id, found);
  }
  return opened.get(id);
}

/** Read again what another tab has written, unless it was deleted there; returns whether it still exists. */
export function reopen(id) {
  const found = stored.readJson(`conversation.${id}`, null);
  if (found && opened.has(id)) Object.assign(opened.get(id), found);
  return Boolean(found);
}

/** Keep a conversation, with what another tab added meanwhile. Returns whether the browser had room for it. */
export function save(conversation) {
  const theirs = stored.readJson(`conversation.${conversation.id}`, null);
  for (const [id, turn] of Object.entries(theirs?.turns ?? {})) conversation.turns[id] ??= turn;
  if (!conversation.title) {
    const first = children(conversation, ROOT)[0];
    conversation.title = first ? first.user.replace(/\s+/g, " ").trim().slice(0, TITLE) : "";
  }
  conversation.used = Date.now();
  return stored.write(`conversation.${conversation.id}`, JSON.stringify(conversation));
}

/** Forget a conversation and what was being typed in it. */
export function remove(id) {
  opened.delete(id);
  stored.write(`conversation.${id}`, null);
  stored.write(`draft.${id}`, null);
}

/** All that are kept, the last used first: [{id, title}]. */
export function all() {
  return stored
    .names("conversation.")
    .map((name) => stored.readJson(name, null))
    .filter(Boolean)
    .sort((a, b) => b.used - a.used)
    .map(({ id, title }) => ({ id, title }));
}

/** The id of a conversation that has a draft and nothing else yet; undefined if there is none. */
export const begun = () =>
  stored
    .names("draft.")
    .map((name) => name.slice("draft.".length))
    .find((id) => !open(id)?.title);

/** What was being typed: {text, edit: null | {turn, kind, text}}. */
export const draft = (id) => stored.readJson(`draft.${id}`, { text: "", edit: null });

/** Keep what is being typed; nothing typed needs no room. */
export function keepDraft(id, { text, edit }) {
  return stored.write(`draft.${id}`, text || edit ? JSON.stringify({ text, edit }) : null);
}

/** The conversation this tab looks at: its own choice, else the last one of any tab. */
export function active() {
  try {
    return sessionStorage.getItem("rwkv.active") ?? stored.read("active");
  } catch {
    return stored.read("active");
  }
}

export function setActive(id) {
  stored.write("active", id);
  try {
    sessionStorage.setItem("rwkv.active", id);
  } catch {
    // storage is forbidden; the choice lasts as long as the page
  }
}

/** The turns that follow a turn, oldest first. */
export function children(conversation, parent) {
  return Object.values(conversation.turns)
    .filter((turn) => turn.parent === parent)
    .sort((a, b) => a.created - b.created);
}

/** The turns that are looked at, from the first to the last. */
export function path(conversation) {
  const turns = [];
  for (let at = ROOT; ; ) {
    const next = children(conversation, at);
    if (!next.length) return turns;
    const turn = next.find(({ id }) => id === conversation.shown[at]) ?? next.at(-1);
    turns.push(turn);
    at = turn.id;
  }
}

/** A new turn after `parent`, which is looked at from now on. */
export function add(conversation, parent, user) {
  const begun = { reply: "", response: null, status: "streaming", why: "", created: Date.now() };
  const turn = { id: newId(), parent, user, ...begun };
  conversation.turns[turn.id] = turn;
  conversation.shown[parent] = turn.id;
  return turn;
}

/** Take back a turn that never began; what was looked at before is again. */
export function drop(conversation, turn, shownBefore) {
  delete conversation.turns[turn.id];
  if (shownBefore) conversation.shown[turn.parent] = shownBefore;
  else delete conversation.shown[turn.parent];
}

/** The turns up to and with one, oldest first. */
export function upTo(conversation, id) {
  const turns = [];
  for (let turn = conversation.turns[id]; turn; turn = conversation.turns[turn.parent]) turns.unshift(turn);
  return turns;
}

/** Their messages, as the server takes them in one piece; said(turn) is what counts as a turn's reply. */
export const messages = (turns, said) =>
  turns.flatMap((turn) => [
    { role: "user", content: turn.user },
    ...(said(turn) ? [{ role: "assistant", content: said(turn) }] : []),
  ]);
