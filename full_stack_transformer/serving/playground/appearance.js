// Theme and colours of the tokens, as they were chosen before.

import { byId } from "./elements.js";

const THEMES = { "": ["◐", "as the system has it"], light: ["☀", "light"], dark: ["☾", "dark"] };

// A text is tinted from the start, an answer is read.
const STANDARD = { notebook: "probability", chat: "nothing" };
const keyOf = (mode) => (mode === "chat" ? "fst.colour.chat" : "fst.colour");
let mode = "notebook";

export function showColourOf(newMode) {
  mode = newMode;
  chooseColour(localStorage.getItem(keyOf(mode)) ?? STANDARD[mode]);
}

export function showAppearance({ onColour }) {
  drawTheme();
  showColourOf("notebook");
  byId("theme").addEventListener("click", nextTheme);
  byId("colour").addEventListener("change", () => {
    chooseColour(byId("colour").value);
    localStorage.setItem(keyOf(mode), byId("colour").value);
    onColour();
  });
}

export function chooseColour(name) {
  byId("colour").value = name;
  document.body.dataset.colour = name;
}

function drawTheme() {
  const [sign, name] = THEMES[document.documentElement.dataset.theme ?? ""];
  byId("theme").textContent = sign;
  byId("theme").ariaLabel = `Theme: ${name}`;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? "";
  const next = names[(names.indexOf(now) + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("fst.theme", next);
  drawTheme();
}
