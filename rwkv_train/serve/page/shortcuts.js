// What the keyboard does, and the dialog that says so.

import { button, byId, composing, el, redraw } from "./dom.js";
import { t } from "./words.js";

const LISTED = [
  ["Enter", "key_send"],
  ["Shift+Enter", "key_line"],
  ["Esc", "key_stop"],
  ["Alt+M", "key_say"],
  ["Alt+N", "key_new"],
  ["Alt+E", "key_edit"],
  ["Alt+C", "key_correct"],
  ["Alt+G", "key_good"],
  ["Alt+B", "key_bad"],
  ["Alt+R", "key_again"],
  ["Alt+, Alt+.", "key_branch"],
  ["Alt+L", "key_corrections"],
  ["Alt+S", "key_settings"],
  ["Alt+H", "key_help"],
];

/** Listen for the keys. stop(): break off the reply; returns whether one was being written. */
export function shortcuts(stop) {
  const last = (name) => () => [...byId("turns").querySelectorAll(`[data-key^="${name}-"]`)].at(-1)?.click();
  const keys = {
    KeyM: () => byId("say").focus(),
    KeyN: () => byId("new").click(),
    KeyE: last("edit"),
    KeyC: last("correct"),
    KeyG: last("good"),
    KeyB: last("bad"),
    KeyR: last("again"),
    Comma: last("branch_before"),
    Period: last("branch_after"),
    KeyL: () => byId("open-corrections").click(),
    KeyS: () => byId("open-settings").click(),
    KeyH: help,
  };
  addEventListener("keydown", (event) => {
    if (composing(event) || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && !event.defaultPrevented && stop()) event.preventDefault();
    const run = event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey && keys[event.code];
    if (!run) return;
    event.preventDefault();
    run();
  });
  byId("open-help").addEventListener("click", help);
}

function help() {
  byId("help").showModal();
}

/** Fill the dialog in the language of now. */
export function drawHelp() {
  const rows = LISTED.map(([keys, word]) => [
    el("dt", {}, keys.split(" ").map((key, n) => [n ? " " : "", el("kbd", {}, key)])),
    el("dd", {}, t(word)),
  ]);
  redraw(
    byId("help"),
    el(
      "div",
      { class: "panel-head" },
      el("h2", { id: "help-title" }, t("help_title")),
      button(t("close"), "close", () => byId("help").close()),
    ),
    el("p", {}, t("help_text")),
    el("h3", {}, t("help_keys")),
    el("dl", { class: "keys" }, rows),
  );
}
