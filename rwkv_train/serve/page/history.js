// All corrections, newest first: what was said, what became of it, and taking it back; teaching without a reply.

import { badge, card } from "./card.js";
import * as corrections from "./corrections.js";
import { announce, button, byId, el, redraw } from "./dom.js";
import { t, when } from "./words.js";

const AT_ONCE = 50; // corrections that are listed before one asks for more
let shown = AT_ONCE;
let sleeping = false;
const typed = { question: "", answer: "" }; // kept while the panel is drawn anew

/** Draw the list. may: {teach}; failed(error) tells a person. */
export function drawHistory(may, failed) {
  const holder = byId("panel-corrections");
  const again = () => drawHistory(may, failed);
  const more = () => {
    shown += AT_ONCE;
    again();
  };
  const newest = corrections.all().reverse();
  const items = newest.slice(0, shown).map((feedback) => item(feedback, failed));
  redraw(
    holder,
    may.teach ? teach(failed) : el("p", { class: "fine" }, t("may_not_teach")),
    newest.length ? el("ol", { class: "history", reversed: true }, items) : el("p", {}, t("no_corrections")),
    newest.length > shown && button(t("more", { n: newest.length - shown }), "more", more),
    newest.length > 0 && may.teach && foot(again, failed),
  );
}

function item(feedback, failed) {
  const { id, question, answer, kind, created_at: created } = feedback;
  const holder = el("div");
  const details = el(
    "details",
    {
      "data-key": `history-${id}`,
      on: {
        toggle: () => {
          if (details.open && !holder.hasChildNodes()) holder.append(card(String(id), failed));
        },
      },
    },
    el(
      "summary",
      { "data-key": `summary-${id}` },
      el(
        "span",
        { class: "history-line" },
        el("span", { class: "text" }, question ?? t("a_text")),
        badge(feedback.status),
      ),
      el("span", { class: "fine text" }, meaning(kind, answer, feedback)),
      created && el("time", { class: "fine", datetime: new Date(created * 1000).toISOString() }, when(created)),
    ),
    holder,
  );
  return el("li", {}, details);
}

function meaning(kind, answer, { rejected, of }) {
  if (kind === "also" || kind === "keep") return t(`means_${kind}`, { of: of ?? "" });
  if (kind === "bad") return t("means_bad", { rejected: rejected ?? "" });
  return t("means_answer", { answer: answer ?? "" });
}

function teach(failed) {
  const field = (name) => {
    const id = `teach-${name}`;
    const area = el("textarea", { id, "data-key": id, rows: 2, maxlength: 2000, required: true });
    area.value = typed[name];
    area.addEventListener("input", () => (typed[name] = area.value));
    return [el("label", { for: id }, t(`teach_${name}`)), area];
  };
  const send = async (event) => {
    event.preventDefault();
    const { question, answer } = { question: typed.question.trim(), answer: typed.answer.trim() };
    if (!question || !answer) return;
    try {
      await corrections.submit({ kind: "answer", question, answer });
      typed.question = typed.answer = "";
      event.target.reset();
    } catch (error) {
      failed(error);
    }
  };
  return el(
    "details",
    { class: "teach", "data-key": "teach" },
    el("summary", { "data-key": "teach-summary" }, t("teach_title")),
    el(
      "form",
      { on: { submit: send } },
      field("question"),
      field("answer"),
      el("button", { type: "submit", "data-key": "teach-go", class: "main-button" }, t("teach_go")),
    ),
  );
}

function foot(again, failed) {
  const sleep = async () => {
    sleeping = true;
    again();
    try {
      await corrections.sleep();
      announce(t("slept"));
    } catch (error) {
      failed(error);
    }
    sleeping = false;
    again();
  };
  const download = async () => {
    try {
      const url = URL.createObjectURL(await corrections.exported());
      el("a", { href: url, download: "corrections.jsonl" }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (error) {
      failed(error);
    }
  };
  return el(
    "div",
    { class: "history-foot" },
    button(t(sleeping ? "sleeping" : "sleep"), "sleep", sleep, {
      class: "small",
      disabled: sleeping,
      title: t("sleep_about"),
    }),
    button(t("export"), "export", download, { class: "small", title: t("export_about") }),
  );
}
