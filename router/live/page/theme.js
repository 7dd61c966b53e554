// Light, dark, or as the system has it. The choice is remembered in this browser.

import { attribute, text } from "./dom.js";

const KEY = "kvcluster.theme";
const NEXT = { auto: "light", light: "dark", dark: "auto" };
const NAMES = { auto: "System", light: "Light", dark: "Dark" };

function remembered() {
  try {
    const theme = localStorage.getItem(KEY);
    return Object.hasOwn(NEXT, theme ?? "") ? theme : "auto";
  } catch {
    return "auto"; // storage is forbidden
  }
}

/** Makes `button` go through the themes. */
export function themeSwitch(button) {
  const label = button.querySelector("[data-label]");
  const use = button.querySelector("use");
  const set = (theme) => {
    attribute(document.documentElement, "data-theme", theme === "auto" ? null : theme);
    attribute(use, "href", `#i-theme-${theme}`);
    attribute(button, "title", `Theme: ${NAMES[theme]}. Change to ${NAMES[NEXT[theme]]}.`);
    text(label, `Theme: ${NAMES[theme]}`);
  };
  let current = remembered();
  set(current);
  button.addEventListener("click", () => {
    set((current = NEXT[current]));
    try {
      localStorage.setItem(KEY, current);
    } catch {
      // It lasts as long as the page does.
    }
  });
}
