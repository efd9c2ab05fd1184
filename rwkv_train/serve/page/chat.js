// The chat page: what is looked at, what is typed, and what the buttons under a reply do.

import * as corrections from "./corrections.js";
import { announce, byId, composing, fit, redraw, stored } from "./dom.js";
import { drawHistory } from "./history.js";
import { isOpen, panels, retitle } from "./panels.js";
import { drawSettings, readSettings } from "./settings.js";
import { drawHelp, shortcuts } from "./shortcuts.js";
import { confirmed, notice, shell } from "./shell.js";
import * as store from "./store.js";
import { json, serverBack } from "./stream.js";
import * as talk from "./talk.js";
import { drawTurn } from "./turns.js";
import { drawList, drawModels, drawWelcome } from "./side.js";
import { t } from "./words.js";

const say = byId("say");
const transcript = byId("transcript");
let conversation = null;
let edit = null; // {turn, kind: message|reply, text} of what is being edited
let models = [];
let model = stored.read("model");

const may = () => models.find(({ id }) => id === model) ?? { talk: true, teach: true, operate: false };

let watching = false; // whether the server is gone and looked for

/** Say what went wrong; where the server is gone, watch until it is back. */
async function failed(error) {
  notice(error.message);
  if (error.status !== 0 || watching) return;
  watching = true;
  await serverBack();
  watching = false;
  notice(null);
  announce(t("server_back"));
  begin();
}

function draw() {
  const path = store.path(conversation);
  const busy = Boolean(talk.runningIn(conversation));
  byId("title").textContent = conversation.title || t("new_conversation");
  document.title = `${conversation.title || t("new_conversation")} · rwkv_train`;
  drawWelcome(path.length > 0, (text) => {
    typed(text);
    say.focus();
  });
  redraw(byId("turns"), path.map((turn, n) => drawOne(turn, n + 1)));
  for (const area of byId("turns").querySelectorAll("textarea")) fit(area, 480);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  drawList(conversation.id, { go, remove });
}

function drawOne(turn, number) {
  return drawTurn(turn, {
    number,
    siblings: talk.siblings(conversation, turn),
    running: talk.running(turn),
    unsettled: talk.unsettled(turn),
    edit: edit?.turn === turn.id ? edit : null,
    may: may(),
    act: {
      edit: (kind) => beginEdit(turn, kind),
      cancel: () => endEdit(turn),
      typed: (text) => {
        edit.text = text;
        keep();
      },
      save: () => saveEdit(turn),
      again: () => ask(turn.parent, turn.user),
      rate: (kind) => correct(turn, { kind }),
      step: (by) => step(turn, by),
      failed,
    },
  });
}

const atEnd = () => transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 80;
const toEnd = () => transcript.scrollTo({ top: transcript.scrollHeight });

/** Show how far the reply of a turn is. */
function show(its, turn) {
  const line = byId("turns").querySelector(`[data-turn="${turn.id}"] [data-reply]`);
  if (its !== conversation || !line || !talk.running(turn)) return;
  const follow = atEnd();
  line.textContent = turn.reply;
  if (follow) toEnd();
}

/** Ask after the turn `parent`; returns whether the server took it. */
async function ask(parent, text) {
  const asked = conversation;
  const running = talk.runningIn(asked);
  if (running) await talk.stop(running);
  notice(null);
  let took = false;
  const changed = () => {
    if (asked !== conversation) return;
    draw();
    toEnd();
    if (document.activeElement === document.body) transcript.focus({ preventScroll: true }); // its button is gone
  };
  let waits = false; // whether pieces wait for the next frame: a screen shows no more than that
  const piece = (turn) => {
    if (waits) return;
    waits = true;
    show(asked, turn);
    requestAnimationFrame(() => {
      waits = false;
      show(asked, turn);
    });
  };
  const began = () => {
    took = true;
    if (edit?.kind === "message" && edit.text.trim() === text) edit = null;
    if (parent === store.ROOT) store.setActive(asked.id);
    if (say.value.trim() === text) typed("");
    changed();
  };
  try {
    const turn = await talk.ask(asked, parent, text, model, { began, piece, changed });
    if (turn) announce(turn.reply ? t("said_reply", { reply: turn.reply }) : t("nothing_said"));
    if (turn?.why) notice(t("broke_off", { why: turn.why }));
  } catch (error) {
    failed(error);
  }
  return took;
}

/** Send a correction of a turn's reply; returns whether the server took it. */
async function correct(turn, body) {
  const corrected = conversation;
  try {
    const { model: profile, id } = await corrections.submit({ response_id: turn.response, ...body });
    turn.corrected = [...(turn.corrected ?? []), `${profile}/${id}`];
    store.save(corrected);
    return true;
  } catch (error) {
    failed(error);
    return false;
  }
}

function beginEdit(turn, kind) {
  const right = corrections.ofReply(turn).findLast((f) => f.kind === "answer" && corrections.counts(f));
  edit = { turn: turn.id, kind, text: kind === "reply" ? (right?.answer ?? turn.reply) : turn.user };
  keep();
  draw();
  const area = byId(`editor-${turn.id}`);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function endEdit(turn) {
  const { kind } = edit;
  edit = null;
  keep();
  draw();
  byId("turns").querySelector(`[data-key="${kind === "reply" ? "correct" : "edit"}-${turn.id}"]`)?.focus();
}

async function saveEdit(turn) {
  const { kind, text } = edit;
  if (!text.trim()) return;
  if (kind === "message") {
    if (await ask(turn.parent, text.trim())) keep();
    return;
  }
  if (!(await correct(turn, { kind: "answer", answer: text.trim() }))) return;
  endEdit(turn);
  [...byId("turns").querySelectorAll(`[data-turn="${turn.id}"] .card`)].at(-1)?.scrollIntoView({ block: "nearest" });
}

function step(turn, by) {
  const all = talk.siblings(conversation, turn);
  const next = all[all.indexOf(turn) + by];
  if (!next) return;
  conversation.shown[turn.parent] = next.id;
  store.save(conversation);
  draw();
  announce(t("branch_said", { n: all.indexOf(next) + 1, of: all.length, text: next.user }));
}

function typed(text) {
  say.value = text;
  fit(say);
  keep();
}

function keep() {
  if (!store.keepDraft(conversation.id, { text: say.value, edit })) notice(t("storage_full"));
}

/** Look at a conversation. */
function go(id) {
  conversation = store.open(id) ?? store.fresh(id);
  store.setActive(conversation.id);
  const draft = store.draft(conversation.id);
  edit = draft.edit && conversation.turns[draft.edit.turn] ? draft.edit : null;
  typed(draft.text);
  draw();
  toEnd();
  talk.settleAll(conversation, draw);
}

async function remove(id) {
  const { title } = store.open(id);
  if (!(await confirmed(t("delete_title"), t("delete_text", { title }), t("delete")))) return;
  const running = talk.runningIn(store.open(id));
  if (running) await talk.stop(running);
  talk.forget(store.open(id));
  store.remove(id);
  if (id === conversation.id) go(store.all()[0]?.id);
  else draw();
  byId("new").focus();
}

function send(event) {
  event?.preventDefault();
  const text = say.value.trim();
  if (text && !talk.runningIn(conversation)) ask(store.path(conversation).at(-1)?.id ?? store.ROOT, text);
}

const stop = () => {
  const running = talk.runningIn(conversation);
  if (running) talk.stop(running);
  return Boolean(running);
};

function drawPanel() {
  if (isOpen("corrections")) drawHistory(may(), failed);
  if (isOpen("settings")) drawSettings(may(), failed);
}

/** Read the corrections of the model that is chosen, and how it learns. */
async function taught() {
  await corrections.use(may().teach ? model : null);
  if (isOpen("settings")) await readSettings(may().teach ? model : null);
}

/** Read what the server has: models, corrections, and how interrupted replies ended. */
async function begin() {
  try {
    models = (await json("GET", "/v1/models")).data.filter((m) => m.talk !== false);
    if (!models.some(({ id }) => id === model)) model = models[0]?.id ?? null;
    drawModels(models, model);
    await Promise.all([taught(), talk.settleAll(conversation, draw)]);
  } catch (error) {
    failed(error);
  }
  draw();
  drawPanel();
}

byId("composer").addEventListener("submit", send);
byId("stop").addEventListener("click", () => (stop(), say.focus()));
byId("new").addEventListener("click", () => (go(store.begun()), say.focus()));
byId("model").addEventListener("change", (event) => {
  model = event.target.value;
  stored.write("model", model);
  taught().catch(failed).then(draw).then(drawPanel);
});
say.addEventListener("input", () => (fit(say), keep()));
say.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
  event.preventDefault();
  send();
});
addEventListener("token", begin); // another person may do other things
addEventListener("pagehide", () => talk.runningIn(conversation) && store.save(conversation));
addEventListener("storage", ({ key }) => {
  if (!key?.startsWith("rwkv.conversation.")) return;
  if (key.endsWith(conversation.id) && !talk.runningIn(conversation) && !edit) store.reopen(conversation.id);
  draw();
});
let drawn = new Set();
corrections.onChange((id) => {
  const now = new Set(corrections.all().map((f) => String(f.id)));
  if (id === null || now.size !== drawn.size) draw();
  drawn = now;
  if (id === null) drawPanel();
});

panels(async (name) => {
  if (name === "settings") await readSettings(may().teach ? model : null);
  drawPanel();
});
shortcuts(stop);
conversation = store.open(store.active()) ?? store.fresh(store.active() ?? undefined);
shell(() => {
  drawHelp();
  retitle();
  draw();
  drawPanel();
});
go(conversation.id);
begin();
