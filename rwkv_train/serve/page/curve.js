// The loss of a correction, step by step, as a small picture.

import { svg } from "./dom.js";
import { t } from "./words.js";

const WIDTH = 340;
const HEIGHT = 104;
const LEFT = 34;
const RIGHT = 44;
const TOP = 10;
const BOTTOM = 22;
const STEPS_AT_LEAST = 8; // so that the first steps do not jump about

const short = (loss) => (loss >= 10 ? loss.toFixed(0) : loss >= 0.1 ? loss.toFixed(1) : loss.toFixed(2));

/** An SVG of steps [{step, loss}]; a loss is in nats a token. */
export function curve(steps) {
  const shown = steps.filter(({ loss }) => Number.isFinite(loss));
  const last = shown.at(-1);
  const highest = Math.max(...shown.map(({ loss }) => loss), 0.1);
  const first = Math.min(...shown.map(({ step }) => step), 1);
  const count = Math.max(STEPS_AT_LEAST, ...shown.map(({ step }) => step - first));
  const x = (step) => LEFT + ((step - first) / count) * (WIDTH - LEFT - RIGHT);
  const y = (loss) => TOP + (1 - loss / highest) * (HEIGHT - TOP - BOTTOM);
  const points = shown.map(({ step, loss }) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`);
  const what = last
    ? t("curve_said", { from: short(shown[0].loss), to: short(last.loss), n: last.step })
    : t("curve_empty");
  const text = (at, up, words, anchor, kind = "curve-text") =>
    svg("text", { x: at, y: up, "text-anchor": anchor, class: kind, "aria-hidden": "true" }, words);
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img", "aria-label": what },
    svg("line", { x1: LEFT, y1: y(0), x2: WIDTH - RIGHT, y2: y(0), class: "curve-axis" }),
    svg("line", { x1: LEFT, y1: TOP, x2: LEFT, y2: y(0), class: "curve-axis" }),
    text(LEFT - 5, y(highest) + 4, short(highest), "end"),
    text(LEFT - 5, y(0) + 4, "0", "end"),
    text(LEFT, HEIGHT - 5, t("curve_axes"), "start"),
    points.length > 1 && svg("polyline", { points: points.join(" "), class: "curve-line" }),
    shown.map(({ step, loss }) => svg("circle", { cx: x(step), cy: y(loss), r: 2.5, class: "curve-dot" })),
    last && svg("circle", { cx: x(last.step), cy: y(last.loss), r: 4, class: "curve-dot" }),
    last && text(x(last.step) + 8, y(last.loss) + 4, short(last.loss), "start", "curve-text curve-now"),
  );
}
