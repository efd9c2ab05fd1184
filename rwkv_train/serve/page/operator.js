// What an operator of the room can do: rules, muting, breaking off, correcting, undoing.

import { button, byId, el, redraw } from "./dom.js";
import { t } from "./words.js";

const PICKS = ["fifo", "random", "newest"];
const LIMITS = ["queue", "per_user", "rate"];
const typed = { mute: "", answer: "", question: "" }; // kept while the panel is drawn anew
let fixed = null; // the turn whose correction is being typed, however many are answered meanwhile
const changed = {}; // rules that were changed and not sent yet

/** Draw the panel for an operator, hide it for others. send(message) -> whether it went. */
export function drawOperator(room, send) {
  byId("operator").hidden = !room.operator;
  if (!room.operator) return redraw(byId("operator-body"));
  redraw(
    byId("operator-body"),
    el(
      "div",
      { class: "row" },
      button(t("skip_reply"), "skip", () => send({ type: "skip" }), { class: "small" }),
      button(t("undo_last"), "undo", () => send({ type: "undo" }), { class: "small" }),
    ),
    correcting(room, send),
    rules(room, send),
    muting(room, send),
  );
}

function field(name, props, tag = "input") {
  const control = el(tag, { id: `operator-${name}`, "data-key": `operator-${name}`, ...props });
  if (name in typed) {
    control.value = typed[name];
    control.addEventListener("input", () => (typed[name] = control.value));
  }
  return control;
}

const form = (title, submit, ...parts) =>
  el(
    "form",
    {
      on: {
        submit: (event) => {
          event.preventDefault();
          submit(event.target);
        },
      },
    },
    el("h3", {}, title),
    parts,
  );

function correcting({ transcript }, send) {
  const last = fixed ?? transcript.at(-1);
  const answer = field("answer", { rows: 2, required: true, maxlength: 2000 }, "textarea");
  answer.addEventListener("input", () => (fixed = answer.value ? last : null));
  const teach = (target) => {
    const message = { type: "teach", answer: typed.answer.trim() };
    if (typed.question.trim()) message.question = typed.question.trim();
    else if (last?.id) message.id = last.id;
    if (!message.answer || !send(message)) return;
    typed.answer = typed.question = "";
    fixed = null;
    target.reset();
  };
  return form(
    t("fix_title"),
    teach,
    last && el("p", { class: "fine text" }, t("fix_last", last)),
    el("label", { for: "operator-answer" }, t("fix_answer")),
    answer,
    el("label", { for: "operator-question" }, t("fix_question")),
    field("question", { maxlength: 2000 }),
    el("button", { type: "submit", class: "main-button", "data-key": "teach" }, t("fix_go")),
  );
}

function rules({ policy }, send) {
  const change = (target) => {
    const message = { type: "policy", pick: target.elements["operator-pick"].value };
    for (const name of LIMITS) message[name] = target.elements[`operator-${name}`].valueAsNumber;
    if (!send(message)) return;
    for (const name of ["pick", ...LIMITS]) delete changed[name];
  };
  const noted = (name) => ({ input: (event) => (changed[name] = event.target.value) });
  const picked = changed.pick ?? policy.pick;
  const pick = el(
    "select",
    { id: "operator-pick", "data-key": "operator-pick", on: noted("pick") },
    PICKS.map((name) => el("option", { value: name, selected: name === picked }, t(`pick_${name}`))),
  );
  const limits = LIMITS.map((name) => {
    const value = changed[name] ?? policy[name];
    const limits = { type: "number", min: 1, max: 10_000, step: 1, required: true };
    const control = field(name, { ...limits, value, on: noted(name) });
    return el("div", { class: "setting" }, el("label", { for: control.id }, t(`limit_${name}`)), control);
  });
  return form(
    t("rules"),
    change,
    el("div", { class: "setting" }, el("label", { for: "operator-pick" }, t("policy")), pick),
    limits,
    el("button", { type: "submit", "data-key": "rules" }, t("policy_go")),
  );
}

function muting({ muted }, send) {
  const mute = (target) => {
    if (!typed.mute.trim() || !send({ type: "mute", user: typed.mute.trim(), on: true })) return;
    typed.mute = "";
    target.reset();
  };
  const items = muted.map((user) => {
    const unmute = () => send({ type: "mute", user, on: false });
    return el("li", {}, button(t("unmute", { user }), `unmute-${user}`, unmute, { class: "small" }));
  });
  return form(
    t("mute_title"),
    mute,
    muted.length ? el("ul", { class: "plain" }, items) : el("p", { class: "fine" }, t("muted_nobody")),
    el("label", { for: "operator-mute" }, t("mute_who")),
    el(
      "div",
      { class: "row" },
      field("mute", { required: true, maxlength: 60 }),
      el("button", { type: "submit", "data-key": "mute-go" }, t("mute_go")),
    ),
  );
}
