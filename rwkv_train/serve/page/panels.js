// The panels beside the conversation. Where there is room they stand beside it, else they lie over it.

import { byId, stored } from "./dom.js";
import { t } from "./words.js";

const NAMES = ["corrections", "settings"];
const narrow = matchMedia("(max-width: 60rem)");
let open = null; // corrections, settings or null
let side = false; // whether the list of conversations lies over the page, where it is narrow
let opener = null; // what gets the focus back

export const isOpen = (name) => open === name;

/** Set up the panels; opened(name) is called when one is opened, to fill it. */
export function panels(opened) {
  const show = (name, from) => {
    open = name;
    if (from) {
      opener = from;
      stored.write("panel", name ?? "none");
    }
    lay();
    if (name) opened(name);
  };
  for (const name of NAMES) {
    const button = byId(`open-${name}`);
    button.addEventListener("click", () => {
      show(open === name ? null : name, button);
      if (open) byId("close-panel").focus();
    });
  }
  const close = () => {
    show(null, opener ?? byId("open-corrections"));
    opener.focus();
  };
  const closeSide = () => {
    side = false;
    lay();
    byId("open-side").focus();
  };
  byId("close-panel").addEventListener("click", close);
  byId("close-side").addEventListener("click", closeSide);
  byId("open-side").addEventListener("click", () => {
    side = true;
    lay();
    byId("close-side").focus();
  });
  byId("side").addEventListener("click", (event) => {
    if (side && event.target.closest("#new, .conversations > li > button:first-child")) {
      side = false;
      lay();
    }
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (side) closeSide();
    else if (open && (narrow.matches || byId("panel").contains(document.activeElement))) close();
  });
  narrow.addEventListener("change", lay);
  const kept = stored.read("panel");
  if (!narrow.matches && kept !== "none") show(NAMES.includes(kept) ? kept : "corrections");
  else lay();
}

/** Show what is open; what lies under an open panel cannot be reached meanwhile. */
function lay() {
  const covered = narrow.matches && Boolean(open || side);
  byId("panel").hidden = !open;
  byId("side").classList.toggle("open", side);
  document.body.classList.toggle("with-panel", Boolean(open));
  byId("main").inert = covered;
  byId("side").inert = narrow.matches && !side;
  document.querySelector(".bar").inert = covered;
  byId("panel-title").textContent = open ? t(open) : "";
  byId("open-side").setAttribute("aria-expanded", String(side));
  for (const name of NAMES) {
    byId(`panel-${name}`).hidden = open !== name;
    byId(`open-${name}`).setAttribute("aria-expanded", String(open === name));
  }
}

/** The panel's title in the language of now. */
export const retitle = () => lay();
