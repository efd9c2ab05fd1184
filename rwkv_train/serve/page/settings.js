// Settings in words: of the replies, kept in the browser, and of corrections, kept by the server.

import { button, byId, el, redraw, stored } from "./dom.js";
import { json } from "./stream.js";
import { has, t } from "./words.js";

/** What can be chosen about replies: limits of the numbers; an empty field leaves it to the server. */
const SAMPLING = [
  { name: "temperature", min: 0, max: 5, step: 0.05 },
  { name: "top_p", min: 0.01, max: 1, step: 0.01 },
  { name: "min_p", min: 0, max: 1, step: 0.01 },
  { name: "max_output_tokens", min: 1, step: 1 },
  { name: "presence_penalty", min: -5, max: 5, step: 0.05 },
  { name: "frequency_penalty", min: -5, max: 5, step: 0.05 },
  { name: "penalty_decay", min: 0, max: 1, step: 0.001 },
  { name: "seed", min: 0, step: 1 },
];

/** Names under which the server has values of those that are left empty; "" are its own. */
const PRESETS = ["", "chat", "text", "greedy", "thinking", "fake-thinking"];

let learning = null; // settings of corrections as the server has them; null if it did not say
let address = ""; // of those settings
let why = "";
const CHOICES = { trainable: ["upper", "full", "localised", "lora", "pissa", "miss", "state"] }; // where the server names none

const part = (title, ...parts) => el("section", {}, el("h3", {}, t(title)), parts);
const fine = (text, props = {}) => el("p", { class: "fine", ...props }, text);

/** Draw both lists. may: {operate}; failed(error) tells a person. */
export function drawSettings(may, failed) {
  redraw(
    byId("panel-settings"),
    part("settings_replies", fine(t("settings_replies_hint")), sampling()),
    part("settings_corrections", corrections(may, failed)),
    part("settings_browser", browser()),
  );
}

/** Read the settings of corrections of a profile; null where none may be taught. */
export async function readSettings(model) {
  address = `/v1/feedback/settings?model=${encodeURIComponent(model)}`;
  try {
    learning = model === null ? null : (await json("GET", address)).data;
    why = model === null ? t("may_not_teach") : "";
  } catch (error) {
    learning = null;
    why = error.message;
  }
}

function row(name, field, ...after) {
  const about = has(`${name}_about`) && fine(t(`${name}_about`), { id: `about-${name}` });
  if (about) field.setAttribute("aria-describedby", about.id);
  return el("div", { class: "setting" }, el("label", { for: field.id }, t(name)), field, ...after, about);
}

function choice(key, name, choices, chosen) {
  const option = (each) => {
    const word = has(`${name}_${each}`) ? t(`${name}_${each}`) : each || t("as_server");
    return el("option", { value: each, selected: each === chosen }, word);
  };
  return el("select", key, choices.map(option));
}

function sampling() {
  const chosen = stored.readJson("sampling", {});
  const keep = (name, value) => {
    const now = stored.readJson("sampling", {});
    if (value === "" || Number.isNaN(value)) delete now[name];
    else now[name] = value;
    stored.write("sampling", JSON.stringify(now));
  };
  const system = el("textarea", { id: "s-instructions", "data-key": "s-instructions", rows: 3 });
  system.value = chosen.instructions ?? "";
  system.addEventListener("change", () => keep("instructions", system.value.trim()));
  const preset = choice({ id: "s-preset", "data-key": "s-preset" }, "preset", PRESETS, chosen.preset ?? "");
  preset.addEventListener("change", () => keep("preset", preset.value));
  const numbers = SAMPLING.map(({ name, min, max, step }) => {
    const id = `s-${name}`;
    const field = el("input", { id, "data-key": id, type: "number", min, max, step, placeholder: t("as_server") });
    field.value = chosen[name] ?? "";
    field.addEventListener("change", () => {
      if (field.reportValidity()) keep(name, field.valueAsNumber);
    });
    return row(name, field);
  });
  return [row("instructions", system), row("preset", preset), numbers];
}

function corrections(may, failed) {
  if (!learning) return el("p", { class: "why" }, why || t("loading"));
  const hint = fine(t(may.operate ? "settings_corrections_hint" : "settings_fixed"));
  return [hint, learning.map((setting) => correctionSetting(setting, may, failed))];
}

function correctionSetting(setting, may, failed) {
  const { name, value, choices = CHOICES[setting.name], description } = setting;
  const id = `c-${name}`;
  const key = { id, "data-key": id, disabled: !may.operate };
  let field;
  if (choices) {
    field = choice(key, name, choices, value);
  } else if (typeof value === "boolean") {
    field = el("input", { ...key, type: "checkbox", checked: value });
  } else {
    const whole = setting.type === "int" || setting.type === "integer";
    const number = typeof value === "number" && { type: "number", min: 0, step: whole ? 1 : "any" };
    field = el("input", { ...key, type: "text", ...number });
    field.value = value;
  }
  const send = async (to) => {
    try {
      learning = (await json("PATCH", address, { [name]: to })).data;
    } catch (error) {
      failed(error);
    }
    drawSettings(may, failed);
  };
  field.addEventListener("change", () => {
    if (field.type === "checkbox") return send(field.checked);
    if (field.type !== "number") return send(field.value);
    return field.reportValidity() && !Number.isNaN(field.valueAsNumber) && send(field.valueAsNumber);
  });
  const usual = `${name}_${setting.default}`;
  const shownDefault = has(usual) ? t(usual) : setting.default;
  const reset = () => send(setting.default);
  const back =
    value !== setting.default &&
    may.operate &&
    button(t("back_to", { value: shownDefault }), `back-${name}`, reset, { class: "small quiet" });
  if (has(name)) return row(name, field, back);
  return el("div", { class: "setting" }, el("label", { for: id }, name), field, back, fine(description));
}

function browser() {
  if (!stored.read("token")) return fine(t("kept_here"));
  const forget = (event) => {
    stored.write("token", null);
    event.currentTarget.replaceWith(fine(t("token_forgotten")));
  };
  return [fine(t("kept_here")), button(t("token_forget"), "forget", forget, { class: "small" })];
}
