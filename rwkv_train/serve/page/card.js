// A correction as a card: how far it is, its curve, before and after, what was taken along and kept, undo.

import * as corrections from "./corrections.js";
import { curve } from "./curve.js";
import { button, el, redraw } from "./dom.js";
import { driftInWords, t, whyNot } from "./words.js";

const FIRST = 6; // questions of a kind that are shown before one asks for more
const PHASES = ["received", "preparing", "learning", "checked"];
const replaying = new Set(); // ids whose events are read again for their curve

/** A holder whose card is drawn anew whenever something about the correction changes. failed(error) tells a person. */
export function card(id, failed) {
  const holder = el("section", { class: "card", "data-feedback": id, "data-holder": true });
  holder.failed = failed;
  draw(holder);
  return holder;
}

corrections.onChange((id) => {
  for (const holder of document.querySelectorAll("[data-holder][data-feedback]")) {
    if (id === null || holder.dataset.feedback === String(id)) draw(holder);
  }
});

function draw(holder) {
  const feedback = corrections.get(holder.dataset.feedback);
  if (!feedback) return holder.replaceChildren();
  const act = (job) => async (event) => {
    const pressed = event.currentTarget;
    pressed.disabled = true;
    try {
      await job();
    } catch (error) {
      pressed.disabled = false;
      holder.failed(error);
    }
  };
  holder.setAttribute("aria-label", t(`kind_${feedback.kind}`, { id: feedback.id }));
  redraw(holder, head(feedback, act), ...body(feedback, act));
}

/** The status as a badge: a word, and a colour besides. */
export const badge = (status) => el("span", { class: `badge badge-${status}` }, t(`status_${status}`));

function head(feedback, act) {
  const leaving = corrections.leaving(feedback.id);
  const takeBack = button(t(leaving ? "undoing" : "undo"), "undo", act(() => corrections.undo(feedback.id)), {
    class: "small",
    disabled: leaving,
    "aria-label": t("undo_which", { id: feedback.id }),
  });
  return el(
    "div",
    { class: "card-head" },
    el("h3", {}, t(`kind_${feedback.kind}`, { id: feedback.id })),
    badge(feedback.status),
    corrections.undoable(feedback) && takeBack,
  );
}

function body(feedback, act) {
  const { outcome, status } = feedback;
  const parts = [];
  if (corrections.unfinished(feedback)) parts.push(...onTheWay(feedback));
  if (status === "undone" && feedback.answer) parts.push(sentence(t("undone_was", { answer: feedback.answer })));
  if (status === "outdated") parts.push(sentence(t("outdated_why")));
  if (status === "failed") parts.push(sentence(t("failed_why", { why: outcome?.why ?? "" }), "why"));
  else if (outcome && status !== "undone") parts.push(...ended(feedback, outcome, act));
  if (status === "learnt" && feedback.kind !== "bad" && feedback.of === null) parts.push(more(feedback, act));
  return parts;
}

const sentence = (text, kind = "") => el("p", { class: kind }, text);

function onTheWay(feedback) {
  const now = corrections.progress(feedback.id);
  const at = feedback.status === "waiting" && now.phase === "received" ? 0 : PHASES.indexOf(now.phase);
  const items = PHASES.map((phase, n) => {
    const reached = n < at ? "done" : n === at ? "now" : "later";
    return el("li", { class: reached, "aria-current": reached === "now" && "step" }, t(`phase_${phase}`));
  });
  const parts = [el("ol", { class: "phases" }, items)];
  const last = now.steps.at(-1);
  if (now.phase === "received" && corrections.waitsForModel(feedback)) {
    parts.push(el("progress", { "aria-label": t("phase_preparing") }), sentence(t("waits_for_model"), "fine"));
  } else if (now.phase === "received") parts.push(sentence(t(`status_${feedback.status}_long`), "fine"));
  if (now.phase === "preparing") parts.push(...preparing(now.watch));
  if (last) parts.push(sentence(t("step_now", { n: last.step, loss: last.loss.toFixed(3) }), "fine"), curve(now.steps));
  return parts;
}

function preparing({ n, of, what }) {
  return [
    el("progress", { max: of, value: n, "aria-label": t("phase_preparing"), title: what }),
    sentence(t("preparing_now", { n, of }), "fine"),
  ];
}

function ended(feedback, outcome, act) {
  const parts = [];
  if (!outcome.accepted) parts.push(sentence(t("not_learnt", { why: whyNot(outcome.why) }), "why"));
  else if (!outcome.steps) parts.push(sentence(t("was_so_already")));
  parts.push(compared(feedback, outcome));
  if (outcome.accepted) {
    parts.push(sentence(driftInWords(outcome.drift)));
    if (outcome.share < 1) parts.push(sentence(t("share", { percent: Math.round(outcome.share * 100) })));
  }
  if (outcome.note) parts.push(sentence(outcome.note, "fine"));
  if (outcome.accepted) {
    parts.push(questions(feedback, outcome.paraphrases, "keep", act));
    parts.push(questions(feedback, outcome.contrasts, "also", act));
  }
  parts.push(how(feedback, outcome));
  return parts.filter(Boolean);
}

function compared({ question, answer }, outcome) {
  const pair = (word, text, kind) => [el("dt", {}, t(word)), el("dd", { class: kind }, text || t("nothing_said"))];
  const learnt = [pair("before", outcome.answer_before, "was"), pair("after", outcome.answer_after, "is")];
  const still = [answer && pair("should_be", answer), pair("still", outcome.answer_before)];
  return el("dl", { class: "compared" }, pair("asked", question), outcome.accepted ? learnt : still);
}

/** Questions that were taken along (refused by "keep") or kept as they were (refused by "also"). */
function questions(feedback, texts, kind, act) {
  if (!texts?.length) return null;
  const items = texts.map((text) => el("li", {}, el("q", { class: "text" }, text), refusal(feedback, text, kind, act)));
  const key = `questions-${kind}`;
  const rest = items.slice(FIRST);
  return el(
    "details",
    { "data-key": key, open: kind === "keep", class: "questions" },
    el("summary", { "data-key": `${key}-summary` }, t(`questions_${kind}`, { n: texts.length })),
    sentence(t(`questions_${kind}_hint`), "fine"),
    el("ul", {}, items.slice(0, FIRST)),
    rest.length > 0 &&
      el(
        "details",
        { "data-key": `${key}-rest` },
        el("summary", { "data-key": `${key}-rest-summary` }, t("more", { n: rest.length })),
        el("ul", {}, rest),
      ),
  );
}

function refusal(feedback, text, kind, act) {
  const said = corrections.belonging(feedback.id).findLast((f) => f.kind === kind && f.question === text);
  const tried = said && said.status !== "undone";
  const badges = tried && [el("span", { class: "fine" }, t(`refused_${kind}`)), badge(said.status)];
  if (!tried || !corrections.undoable(said)) {
    const send = act(() => corrections.submit({ kind, question: text, of: feedback.id }));
    const label = t(`refuse_${kind}_which`, { question: text });
    const refuse = button(t(`refuse_${kind}`), `${kind}-${text}`, send, { class: "small", "aria-label": label });
    const why = tried && said.outcome && el("span", { class: "fine" }, whyNot(said.outcome.why));
    return el("span", { class: "row" }, badges, why, refuse);
  }
  const takeBack = act(() => corrections.undo(said.id));
  const label = t("undo_which", { id: said.id });
  return el(
    "span",
    { class: "row" },
    badges,
    button(t("undo"), `${kind}-${text}`, takeBack, { class: "small", "aria-label": label }),
  );
}

function how(feedback, outcome) {
  const id = String(feedback.id);
  const { steps } = corrections.progress(id);
  const open = async (event) => {
    if (!event.currentTarget.open || steps.length || replaying.has(id)) return;
    replaying.add(id);
    await corrections.replay(id);
  };
  const [from, to] = [outcome.loss_before, outcome.loss_after].map((loss) => loss?.toFixed(3) ?? "?");
  const seconds = outcome.seconds?.toFixed(1) ?? "?";
  return el(
    "details",
    { "data-key": "how", open: steps.length > 0, on: { toggle: open } },
    el("summary", { "data-key": "how-summary" }, t("how_learnt")),
    sentence(t("how_numbers", { steps: outcome.steps, seconds, from, to }), "fine"),
    steps.length > 0 && curve(steps),
  );
}

/** Saying more about a correction: another way to ask it, or a question that keeps its answer. */
function more(feedback, act) {
  const id = `more-${feedback.id}-${Math.random().toString(36).slice(2)}`;
  const input = el("input", { id, "data-key": "more", maxlength: 2000 });
  const send = (kind) =>
    act(async () => {
      if (!input.value.trim()) return input.focus();
      await corrections.submit({ kind, question: input.value.trim(), of: feedback.id });
    });
  const others = corrections.belonging(feedback.id).filter(({ question, status, kind }) => {
    const listed = kind === "keep" ? feedback.outcome.paraphrases : feedback.outcome.contrasts;
    return status !== "undone" && !listed?.includes(question);
  });
  const lines = others.map((f) =>
    el("li", {}, el("span", {}, t(`belongs_${f.kind}`), " ", el("q", { class: "text" }, f.question)), badge(f.status)),
  );
  return el(
    "details",
    { "data-key": "more-details" },
    el("summary", { "data-key": "more-summary" }, t("say_more")),
    lines.length > 0 && el("ul", { class: "questions" }, lines),
    el("label", { for: id }, t("say_more_question")),
    input,
    el(
      "div",
      { class: "row" },
      button(t("say_also"), "more-also", send("also"), { class: "small" }),
      button(t("say_keep"), "more-keep", send("keep"), { class: "small" }),
    ),
  );
}
