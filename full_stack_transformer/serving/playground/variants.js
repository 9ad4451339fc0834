// Several continuations of one text side by side, of one model or of two.

import { byId, make } from "./elements.js";
import { TokenText } from "./token_text.js";

const place = byId("variants");
let cards = [];

// A card for each candidate; keep(candidate) when one is chosen.
export function open(candidates, { onToken, keep }) {
  cards = candidates.map((candidate, index) => {
    const view = new TokenText({
      label: `Variant ${index + 1}, ${candidate.model}`, readOnly: true,
      onToken: (...given) => onToken(view, ...given),
    });
    const state = make("span", { className: "meaning" });
    const button = make("button", { on: { click: () => keep(candidate) } }, "Keep this one");
    const title = make("h3", {}, candidate.model);
    const element = make("article", { className: "variant" }, title, view.element,
      make("footer", {}, state, button));
    return { candidate, view, state, element };
  });
  place.replaceChildren(...cards.map((one) => one.element));
  place.hidden = false;
  place.scrollIntoView({ block: "nearest" });
}

export function draw(describe) {
  for (const { candidate, view, state } of cards) {
    view.set(candidate.text, candidate.marks(0));
    state.textContent = describe(candidate);
  }
}

export function close() {
  place.replaceChildren();
  place.hidden = true;
  cards = [];
}

export const isOpen = () => cards.length > 0;
