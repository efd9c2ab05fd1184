// The list of conversations, the choice of models, and what is shown before the first message.

import { button, byId, el, redraw } from "./dom.js";
import { all } from "./store.js";
import { t } from "./words.js";

/** Draw the list. current: id of the conversation that is looked at; act: {go(id), remove(id)}. */
export function drawList(current, act) {
  const items = all().map(({ id, title }) =>
    el(
      "li",
      { class: id === current && "current" },
      button(title, `go-${id}`, () => act.go(id), { "aria-current": id === current && "true" }),
      button("\u00d7", `remove-${id}`, () => act.remove(id), {
        class: "quiet",
        "aria-label": t("delete_which", { title }),
        title: t("delete"),
      }),
    ),
  );
  redraw(byId("conversations"), items);
}

/** Draw the words before the first message; try(text) puts an example into the line. */
export function drawWelcome(talking, tryIt) {
  const holder = byId("welcome");
  holder.hidden = talking;
  if (talking) return;
  const examples = ["example_1", "example_2", "example_3"].map((name) =>
    el("li", {}, button(t(name), name, () => tryIt(t(name)))),
  );
  redraw(
    holder,
    el("h2", {}, t("welcome_title")),
    el("p", {}, t("welcome_text")),
    el("p", { class: "fine" }, t("welcome_try")),
    el("ul", { class: "examples" }, examples),
  );
}

/** Fill the choice of models; one alone is no choice. */
export function drawModels(models, current) {
  const option = ({ id }) => el("option", { value: id, selected: id === current }, id);
  byId("model").replaceChildren(...models.map(option));
  byId("model").hidden = models.length < 2;
}
