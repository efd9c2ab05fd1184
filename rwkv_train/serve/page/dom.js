// Building the page. Text only ever becomes text nodes, so nothing that is shown can become markup.

const SVG = "http://www.w3.org/2000/svg";

/** By id. */
export const byId = (id) => document.getElementById(id);

/** An element. props: attributes, of which true is written bare and null or false not at all; on: {event: handler}. */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same of an SVG. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, handler] of Object.entries(on)) node.addEventListener(event, handler);
  node.append(...present(children));
  return node;
}

/** What is there of children, in lists of any depth: so a part that is left out may be null or false. */
function present(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** A button that says what it does. key: by which focus finds it again after the part around it was drawn anew. */
export function button(text, key, click, props = {}) {
  return el("button", { type: "button", "data-key": key, on: { click }, ...props }, text);
}

/** Put `fresh` in place of what `holder` has, where focus, selection and opened details stay as they were. */
export function redraw(holder, ...fresh) {
  const inside = holder.contains(document.activeElement) ? document.activeElement : null;
  const key = inside?.dataset.key;
  const selection = key && "selectionStart" in inside ? [inside.selectionStart, inside.selectionEnd] : null;
  const opened = new Map([...holder.querySelectorAll("details[data-key]")].map((d) => [d.dataset.key, d.open]));
  holder.replaceChildren(...present(fresh));
  for (const details of holder.querySelectorAll("details[data-key]")) {
    if (opened.has(details.dataset.key)) details.open = opened.get(details.dataset.key);
  }
  if (!key) return;
  const again = holder.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (!again) return;
  again.focus({ preventScroll: true });
  if (selection && again.setSelectionRange) again.setSelectionRange(...selection);
}

/** Tell those who listen rather than look. The same text twice is said twice. */
export function announce(text) {
  const live = byId("live");
  live.textContent = live.textContent === text ? `${text}\u00a0` : text;
}

/** Make a text area as high as its text, up to `most` pixels. */
export function fit(area, most = 240) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, most)}px`;
}

/** Whether a key event ends the composition of a character, as in Chinese; such an Enter sends nothing. */
export const composing = (event) => event.isComposing || event.keyCode === 229;

/** localStorage that is allowed to be missing or full. write returns whether it was written. */
export const stored = {
  read(name) {
    try {
      return localStorage.getItem(`rwkv.${name}`);
    } catch {
      return null;
    }
  },
  write(name, value) {
    try {
      if (value === null) localStorage.removeItem(`rwkv.${name}`);
      else localStorage.setItem(`rwkv.${name}`, value);
      return true;
    } catch {
      return false;
    }
  },
  readJson(name, otherwise) {
    try {
      return JSON.parse(this.read(name)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  names(prefix) {
    try {
      return Object.keys(localStorage)
        .filter((name) => name.startsWith(`rwkv.${prefix}`))
        .map((name) => name.slice(5));
    } catch {
      return [];
    }
  },
};
