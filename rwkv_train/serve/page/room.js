// The room's page: whose turn it is, the answer as it comes, who waits, what was just learnt, and saying something.

import { connection } from "./connection.js";
import { curve } from "./curve.js";
import { announce, button, byId, composing, el, redraw, stored } from "./dom.js";
import { drawOperator } from "./operator.js";
import { notice, shell } from "./shell.js";
import { driftInWords, has, t } from "./words.js";

const SAID = 200; // turns of the transcript that are kept on the page
const room = {
  name: "",
  operator: false,
  policy: {},
  muted: [],
  waiting: [],
  transcript: [],
  now: null, // {user, text, reply} whose turn it is
  learning: null, // {id, steps} of the correction that is being learnt
  learnt: null, // the last feedback object that was learnt or refused, or {undone: true}
};
let sent = ""; // what was sent last, to be typed again if it is refused

const heard = {
  welcome({ name, operator, policy, transcript, muted }) {
    Object.assign(room, { name, operator, policy, transcript, muted: muted ?? [], now: null });
    byId("name").value = name; // which the server may have made another, where somebody else has it
    notice(null);
    draw();
  },
  queue({ waiting }) {
    room.waiting = waiting;
    drawQueue();
  },
  asked({ user, text }) {
    room.now = { user, text, reply: "" };
    drawNow();
    announce(t("turn_said", { user, text }));
  },
  piece({ text }) {
    if (!room.now) return;
    room.now.reply += text;
    byId("now").querySelector("[data-reply]").textContent = room.now.reply;
  },
  answered({ user, text, reply, id }) {
    room.transcript = [...room.transcript, { user, text, reply, id }].slice(-SAID);
    room.now = null;
    drawNow();
    drawTranscript();
    operator();
    announce(t("answered_said", { user, reply }));
  },
  refused({ why }) {
    const reason = has(`refused_${why}`) ? t(`refused_${why}`) : why;
    notice(t("refused_why", { why: reason }));
    if (!byId("say").value) byId("say").value = sent;
  },
  policy({ type, ...policy }) {
    Object.assign(room.policy, policy);
    operator();
    announce(t("policy_said"));
  },
  muted({ users }) {
    room.muted = users;
    operator();
  },
  learning({ id, step, loss }) {
    if (room.learning?.id !== id) room.learning = { id, steps: [] };
    if (Number.isFinite(step)) room.learning.steps.push({ step, loss });
    room.learnt = null;
    drawLearnt();
  },
  learnt({ feedback }) {
    room.learnt = feedback;
    room.learning = null;
    drawLearnt();
    announce(t(`said_${feedback.status}`, { answer: feedback.outcome?.answer_after ?? "" }));
  },
  undone() {
    room.learnt = { undone: true };
    drawLearnt();
    announce(t("room_undone"));
  },
  error({ message }) {
    notice(message);
  },
};

const server = connection(
  (message) => heard[message.type]?.(message),
  (state, seconds) => {
    redraw(
      byId("state"),
      el("span", { class: `dot dot-${state}` }),
      t(`state_${state}`, { seconds }),
      (state === "lost" || state === "token") && button(t("connect_now"), "connect", server.now, { class: "small" }),
    );
  },
);

/** Send what an operator or viewer does; says so where there is no connection. Returns whether it was sent. */
function send(message) {
  const went = server.send(message);
  if (!went) notice(t("not_connected"));
  return went;
}

const text = (tag, words, kind = "") => el(tag, { class: `text ${kind}` }, words);

function drawNow() {
  const { now } = room;
  if (!now) return redraw(byId("now"), el("p", { class: "fine" }, t("nobody")));
  redraw(
    byId("now"),
    el("p", { class: "who" }, t("turn_of", { user: now.user })),
    text("p", now.text, "bubble"),
    el("div", { class: "reply running" }, el("p", { class: "text", "data-reply": true }, now.reply)),
  );
}

function drawQueue() {
  const items = room.waiting.map(({ user, text: words }) =>
    el(
      "li",
      {},
      el("strong", { class: "text" }, user, user === room.name && ` (${t("queue_you")})`),
      " ",
      el("span", { class: "text" }, words),
    ),
  );
  redraw(byId("queue"), items.length ? items : el("li", { class: "fine" }, t("queue_empty")));
}

function drawTranscript() {
  const items = [...room.transcript]
    .reverse()
    .map(({ user, text: words, reply }) =>
      el("li", {}, el("p", { class: "who" }, user), text("p", words, "bubble"), text("p", reply)),
    );
  redraw(byId("transcript"), items.length ? items : el("li", { class: "fine" }, t("nothing_yet")));
}

function drawLearnt() {
  const { learning, learnt } = room;
  if (learnt?.undone) return redraw(byId("learnt"), el("p", { class: "card" }, t("room_undone")));
  if (learnt) return redraw(byId("learnt"), learntCard(learnt));
  if (!learning) return redraw(byId("learnt"));
  redraw(
    byId("learnt"),
    el("section", { class: "card" }, el("h3", {}, t("learning_now", { id: learning.id })), curve(learning.steps)),
  );
}

function learntCard({ status, question, answer, outcome }) {
  const pair = (word, words, kind) => [el("dt", {}, t(word)), el("dd", { class: kind }, words || t("nothing_said"))];
  const good = status === "learnt";
  return el(
    "section",
    { class: "card" },
    el("h3", {}, good ? t("just_learnt") : t(`said_${status}`)),
    outcome &&
      el(
        "dl",
        { class: "compared" },
        pair("asked", question),
        good
          ? [pair("before", outcome.answer_before, "was"), pair("after", outcome.answer_after, "is")]
          : [pair("should_be", answer), pair("still", outcome.answer_before)],
      ),
    outcome && good && el("p", { class: "fine" }, driftInWords(outcome.drift)),
  );
}

const operator = () => drawOperator(room, send);

function draw() {
  drawNow();
  drawQueue();
  drawTranscript();
  drawLearnt();
  operator();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = byId("say").value.trim();
  if (!words || !send({ type: "say", text: words })) return;
  sent = words;
  notice(null);
  byId("say").value = "";
  stored.write("draft-room", null);
});
byId("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
byId("say").addEventListener("input", () => stored.write("draft-room", byId("say").value || null));
byId("name").addEventListener("change", () => {
  stored.write("name", byId("name").value.trim() || null);
  server.now();
});

byId("say").value = stored.read("draft-room") ?? "";
byId("name").value = stored.read("name") ?? "";
shell(() => {
  document.title = `${t("room")} · rwkv_train`;
  draw();
  server.tell();
});
server.now();
