// One turn of a conversation as it is shown: the message, the reply, what can be done with it, and its corrections.

import { card } from "./card.js";
import * as corrections from "./corrections.js";
import { button, composing, el, fit } from "./dom.js";
import { t } from "./words.js";

/**
 * A turn.
 *
 * siblings: the turns beside it, itself among them. running: whether this page is reading its reply; unsettled: whether
 * the server is being asked how that ended.
 * edit: null, or {kind: "message"|"reply", text} where it is being edited. may: {teach}.
 * act: {edit(kind), cancel(), typed(text), save(), again(), rate(kind), step(by), failed(error)}
 */
export function drawTurn(turn, { number, siblings, running, unsettled, edit, may, act }) {
  const busy = running || unsettled;
  return el(
    "article",
    { class: "turn", "data-turn": turn.id, "aria-label": t("turn", { n: number }), "aria-busy": busy && "true" },
    asked(turn, running, edit, act),
    reply(turn, running, edit, act),
    el("div", { class: "row actions" }, actions(turn, running, may, act), branches(turn, siblings, act)),
    corrections.ofReply(turn).map((feedback) => card(String(feedback.id), act.failed)),
  );
}

function asked(turn, running, edit, act) {
  const who = el("h2", { class: "who" }, t("you"));
  if (edit?.kind === "message") {
    return el("div", { class: "asked editing" }, who, editor(turn, edit, act, "edit_message"));
  }
  const change = button(t("edit"), `edit-${turn.id}`, () => act.edit("message"), {
    class: "small quiet",
    "aria-label": t("edit_which"),
  });
  const head = el("div", { class: "row" }, !running && change, who);
  return el("div", { class: "asked" }, head, el("p", { class: "text bubble" }, turn.user));
}

function reply(turn, running, edit, act) {
  const who = el("h2", { class: "who" }, t("model_says"));
  if (edit?.kind === "reply") return el("div", { class: "reply" }, who, editor(turn, edit, act, "edit_reply"));
  const right = corrections.rightFor(turn);
  return el(
    "div",
    { class: running ? "reply running" : "reply" },
    who,
    el("p", { class: "text", "data-reply": true }, right ?? turn.reply),
    right !== null && el("p", { class: "fine" }, t("corrected_from"), " ", el("q", { class: "text was" }, turn.reply)),
    !running && note(turn),
  );
}

function note(turn) {
  const word = { streaming: "broken_off", incomplete: "broken_off", stopped: "was_stopped", limit: "was_limit" };
  if (turn.status === "failed") return el("p", { class: "why" }, t("was_failed", { why: turn.why }));
  if (turn.status === "completed" && !turn.reply) return el("p", { class: "fine" }, t("nothing_said"));
  return word[turn.status] ? el("p", { class: "why" }, t(word[turn.status])) : null;
}

function editor(turn, edit, act, label) {
  const id = `editor-${turn.id}`;
  const keys = (event) => {
    if (composing(event)) return;
    if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      act.cancel();
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      act.save();
    }
  };
  const typed = (event) => {
    fit(event.target, 480);
    act.typed(event.target.value);
  };
  const area = el("textarea", { id, "data-key": id, rows: 2, on: { keydown: keys, input: typed } });
  area.value = edit.text;
  return el(
    "div",
    { class: "editor" },
    el("label", { for: id }, t(label)),
    area,
    el(
      "div",
      { class: "row" },
      button(t(`${label}_save`), `save-${turn.id}`, act.save, { class: "main-button small" }),
      button(t("cancel"), `cancel-${turn.id}`, act.cancel, { class: "small" }),
      el("span", { class: "fine" }, t("editor_hint")),
    ),
  );
}

function actions(turn, running, may, act) {
  if (running) return null;
  const small = { class: "small" };
  const again = button(t("again"), `again-${turn.id}`, act.again, { ...small, title: t("again_title") });
  if (!turn.response || !turn.reply || !may.teach) return again;
  return [
    button(t("correct"), `correct-${turn.id}`, () => act.edit("reply"), { ...small, title: t("correct_title") }),
    button(t("good"), `good-${turn.id}`, () => act.rate("good"), { ...small, title: t("good_title") }),
    button(t("bad"), `bad-${turn.id}`, () => act.rate("bad"), { ...small, title: t("bad_title") }),
    again,
  ];
}

function branches(turn, siblings, act) {
  if (siblings.length < 2) return null;
  const at = siblings.indexOf(turn);
  const step = (by, sign, word) =>
    button(sign, `${word}-${turn.parent}`, () => act.step(by), {
      class: "small",
      "aria-label": t(word),
      title: t(word),
      "aria-disabled": !siblings[at + by] && "true",
    });
  return el(
    "span",
    { class: "row branches", role: "group", "aria-label": t("branches") },
    step(-1, "\u2039", "branch_before"),
    el("span", {}, `${at + 1}/${siblings.length}`),
    step(1, "\u203a", "branch_after"),
  );
}
