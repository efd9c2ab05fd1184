// The words of the page in the language that <html lang> names. Every word that a person reads is in words_*.js.

import { en as enGeneral } from "./words_en.js";
import { en as enRoom, zh as zhRoom } from "./words_room.js";
import { en as enSettings, zh as zhSettings } from "./words_settings.js";
import { zh as zhGeneral } from "./words_zh.js";

const en = { ...enGeneral, ...enSettings, ...enRoom };
const zh = { ...zhGeneral, ...zhSettings, ...zhRoom };

export const inChinese = () => document.documentElement.lang.startsWith("zh");

const words = () => (inChinese() ? zh : en);

/** Whether there are words for a name. */
export const has = (name) => name in en;

/** The words for a name, with {these} replaced by values. */
export function t(name, values = {}) {
  const text = words()[name] ?? en[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");
}

/** Put words into the parts of a page that name them: as text, label or hint. */
export function translate(root) {
  for (const node of root.querySelectorAll("[data-word]")) node.textContent = t(node.dataset.word);
  for (const node of root.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of root.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
}

/** Reasons that the server gives in English, as patterns of them. */
const REASONS = [
  [/^everything else would drift by ([\d.e-]+) nats a token, over max_kl, ([\d.e-]+)/, "why_drift"],
  [/^decoding still gives (another answer .*?: )?['"](.*)['"]$/s, "why_still"],
  [/^the steps left numbers that are not finite/, "why_numbers"],
];

/** Why something was not learnt, in the language of now where the reason is a known one. */
export function whyNot(why) {
  for (const [pattern, name] of REASONS) {
    const found = pattern.exec(why ?? "");
    if (found) return t(name, { a: found[1], b: found[2] });
  }
  return why ?? "";
}

/** How much else has changed: in words, and as it was measured in nats a token. */
export function driftInWords(drift) {
  const limits = [
    [0.001, "drift_none"],
    [0.01, "drift_little"],
    [0.05, "drift_some"],
    [Infinity, "drift_much"],
  ];
  const [, word] = limits.find(([limit]) => drift < limit) ?? limits.at(-1);
  return `${t(word)} ${t("drift_number", { drift: drift < 0.00005 ? "0" : drift.toFixed(4) })}`;
}

/** A time in seconds since 1970 as a person says it. */
export function when(seconds) {
  const style = { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(document.documentElement.lang, style).format(seconds * 1000);
}
