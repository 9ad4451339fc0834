// The list of tokens that could stand in a place, with their probabilities; one can be taken.

import { byId, make, percent, visible } from "./elements.js";

const list = byId("alternatives");
let current = null;
let hiding = 0;
let showing = 0;

const isText = (token) => !token.startsWith("bytes:");

function rowOf(place, token, logprob) {
  const { mark, take, controls } = place;
  const isControl = controls.has(token);
  const isTaken = token === mark.token;
  const name = isControl ? "end of the text" : isText(token) ? visible(token) : "part of a character";
  const bar = make("i", { className: "probability" });
  bar.style.width = `${100 * Math.exp(logprob)}%`;
  return make("button", {
    className: isControl || !isText(token) ? "control" : "",
    disabled: !isText(token) || !take,
    tabIndex: -1,
    data: { token },
    attributes: { "aria-pressed": String(isTaken) },
    on: {
      click: () => {
        hide();
        take?.(mark, isControl ? "" : token, logprob);
      },
    },
  }, bar, make("b", {}, name), make("span", {}, percent(logprob)));
}

// Places the list at a token; `take(mark, text, logprob)` is called with the one that was chosen.
export function show(mark, box, how, { take, controls, from }) {
  clearTimeout(hiding);
  clearTimeout(showing);
  if (!mark) {
    if (current && (how !== "leave" || !current.isPinned)) hiding = setTimeout(hide, how === "click" ? 0 : 250);
    return;
  }
  if (current?.mark === mark && (how === "hover" || current.isPinned)) return;
  if (how === "hover" && current?.isPinned) return;
  const open = () => {
    current = { mark, take, controls, from, isPinned: how !== "hover" };
    const rows = mark.top.map(([token, logprob]) => rowOf(current, token, logprob));
    if (!mark.top.some(([token]) => token === mark.token)) rows.push(rowOf(current, mark.token, mark.logprob));
    const bits = make("p", {}, `${(-mark.logprob / Math.LN2).toFixed(1)} bits of surprise`);
    list.replaceChildren(...rows, bits);
    list.hidden = false;
    const left = Math.min(box.left, innerWidth - list.offsetWidth - 8);
    const above = box.top - list.offsetHeight - 6;
    const below = box.bottom + 6;
    const top = below + list.offsetHeight > innerHeight && above > 0 ? above : below;
    list.style.left = `${Math.max(8, left) + scrollX}px`;
    list.style.top = `${top + scrollY}px`;
    if (how === "keyboard") (list.querySelector("button:not(:disabled)") ?? list).focus();
  };
  // A pointer that only passes by opens nothing.
  if (how === "hover") showing = setTimeout(open, current ? 40 : 120);
  else open();
}

export function hide() {
  clearTimeout(showing);
  clearTimeout(hiding);
  const hadFocus = list.contains(document.activeElement);
  list.hidden = true;
  if (hadFocus) current?.from?.focus();
  current = null;
}

export const isOpen = () => current !== null;

list.addEventListener("pointerenter", () => clearTimeout(hiding));
list.addEventListener("pointerleave", () => {
  if (!current?.isPinned) hiding = setTimeout(hide, 250);
});
list.addEventListener("keydown", (event) => {
  const rows = [...list.querySelectorAll("button:not(:disabled)")];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || !rows.length) return;
  event.preventDefault();
  rows.at((rows.indexOf(document.activeElement) + step) % rows.length).focus();
});
document.addEventListener("pointerdown", (event) => {
  if (current && !list.contains(event.target) && event.target !== current.from) hide();
});
