// What both pages have around them: words, theme, language, dialogs, and the one line that says what went wrong.

import { button, byId, el, stored } from "./dom.js";
import { onToken } from "./stream.js";
import { inChinese, t, translate } from "./words.js";

const THEMES = ["system", "light", "dark"];

/** Set up the switches and the dialog for a token. redrawn() draws everything anew in the language of now. */
export function shell(redrawn) {
  const draw = () => {
    translate(document);
    byId("theme").textContent = t(`theme_${theme()}`);
    byId("language").textContent = inChinese() ? "English" : "中文";
    byId("language").lang = inChinese() ? "en" : "zh-CN";
    redrawn();
  };
  byId("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
    byId("theme").textContent = t(`theme_${theme()}`);
  });
  byId("language").addEventListener("click", () => {
    document.documentElement.lang = inChinese() ? "en" : "zh-CN";
    stored.write("language", document.documentElement.lang);
    draw();
  });
  onToken(askForToken);
  draw();
}

const theme = () => document.documentElement.dataset.theme ?? "system";

function setTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  stored.write("theme", name === "system" ? null : name);
}

/** Say in one line what is wrong and what to do; null takes the line away. */
export function notice(text) {
  const line = byId("notice");
  line.hidden = !text;
  line.replaceChildren();
  if (text) line.append(el("span", {}, text), button(t("dismiss"), "dismiss", () => notice(null), { class: "small" }));
}

/** A question in a dialog with a form; resolves to what `read` returns, or null if it was left. */
function asked(title, parts, action, read) {
  const dialog = byId("ask");
  return new Promise((resolve) => {
    let answer = null;
    const form = el(
      "form",
      {
        method: "dialog",
        on: {
          submit: () => {
            answer = read();
          },
        },
      },
      el("h2", { id: "ask-title" }, title),
      parts,
      el(
        "div",
        { class: "row" },
        el("button", { type: "submit", class: "main-button" }, action),
        button(t("cancel"), "cancel", () => dialog.close()),
      ),
    );
    dialog.replaceChildren(form);
    dialog.addEventListener("close", () => resolve(answer), { once: true });
    dialog.showModal();
  });
}

/** Whether a person agrees. */
export const confirmed = (title, text, action) => asked(title, el("p", {}, text), action, () => true);

function askForToken(wasWrong) {
  const field = el("input", { id: "token", type: "password", autocomplete: "current-password", required: true });
  const parts = [
    el("p", {}, t(wasWrong ? "token_wrong" : "token_why")),
    el("label", { for: "token" }, t("token")),
    field,
  ];
  return asked(t("token_title"), parts, t("token_go"), () => field.value.trim() || null);
}
