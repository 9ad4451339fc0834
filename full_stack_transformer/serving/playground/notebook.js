// The notebook: one text that the model continues in place.

import { byId } from "./elements.js";
import { marksOf, tokensOfCompletion } from "./generation.js";
import { askJson } from "./service.js";
import { TokenText } from "./token_text.js";

export class Notebook {
  constructor({ onEdit, beforeEdit, onToken }) {
    this.view = new TokenText({
      label: "Text to continue", placeholder: "Begin a text; the model goes on from where it ends …",
      onEdit, beforeEdit, onToken: (...given) => onToken(this.view, ...given),
    });
    byId("sheet").append(this.view.element);
    this.mode = "notebook";
    this.path = "/v1/completions";
  }

  snapshot() {
    return { text: this.view.text, marks: this.view.marks };
  }

  restore({ text = "", marks = [] } = {}) {
    this.view.set(text, marks);
  }

  // From where the next continuation starts, and what is asked for.
  begin() {
    this.base = this.snapshot();
    return { prompt: this.base.text };
  }

  resume() {
    return this.begin();
  }

  preview() {
    return { prompt: this.view.text };
  }

  withProbabilities(body, number) {
    return number ? { ...body, logprobs: number } : body;
  }

  show(candidate) {
    const { text, marks } = this.base;
    this.view.set(text + candidate.text, [...marks, ...candidate.marks(text.length)]);
  }

  // Another token in place of `mark`, and nothing after it.
  branch(view, mark, token, logprob) {
    const text = view.text.slice(0, mark.start) + token;
    const kept = view.marks.filter((one) => one.end <= mark.start);
    const taken = { ...mark, end: mark.start + token.length, token, logprob };
    view.set(text, token ? [...kept, taken] : kept);
  }

  lock(isLocked) {
    this.view.area.readOnly = isLocked;
  }

  focus() {
    this.view.area.focus({ preventScroll: true });
  }

  get title() {
    return this.view.text.trim().slice(0, 80);
  }

  get isEmpty() {
    return !this.view.text;
  }

  // Scores the whole text and tints all of it; returns its metrics.
  async measure(model, numAlternatives, signal) {
    const text = this.view.text;
    const body = { model, prompt: text, echo: true, max_tokens: 0, logprobs: Math.max(1, numAlternatives) };
    const { choices: [choice] } = await askJson(this.path, { body, signal });
    const tokens = tokensOfCompletion(choice.logprobs);
    const made = this.view.marks.filter((mark) => mark.made);
    const marks = marksOf(text, tokens, { made: false }).map((mark) => ({
      ...mark, made: made.some((one) => one.start < mark.end && mark.start < one.end),
    }));
    this.view.set(text, marks);
    const known = tokens.filter((one) => one.logprob !== null);
    const total = known.reduce((sum, one) => sum - one.logprob, 0);
    // The first token has no probability, so its bytes do not count.
    const scored = [...text].slice(known[0]?.offset ?? 0).join("");
    const numBytes = new TextEncoder().encode(scored).length;
    return {
      numTokens: known.length,
      perplexity: Math.exp(total / known.length),
      bitsPerByte: total / Math.LN2 / numBytes,
    };
  }
}
