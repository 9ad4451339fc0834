// The chat: messages that can all be edited, answered anew and continued.

import { byId, make } from "./elements.js";
import { TokenText } from "./token_text.js";

const NAMES = { system: "System", user: "You", assistant: "Model" };

export class Chat {
  constructor({ onEdit, beforeEdit, onToken, onAct }) {
    this.handlers = { onEdit, beforeEdit };
    this.onToken = onToken;
    this.onAct = onAct;
    this.messages = [];
    this.mode = "chat";
    this.path = "/v1/chat/completions";
    this.composer = byId("message");
  }

  snapshot() {
    const messages = this.messages.map(({ role, view }) => ({ role, text: view.text, marks: view.marks }));
    return { messages, draft: this.composer.value };
  }

  restore({ messages = [], draft = "" } = {}) {
    this.messages = [];
    byId("messages").replaceChildren();
    for (const { role, text, marks } of messages) this.add(role, text, marks ?? []);
    this.composer.value = draft;
  }

  add(role, text = "", marks = []) {
    const view = new TokenText({
      label: `Message: ${NAMES[role]}`, ...this.handlers,
      onToken: (...given) => this.onToken(view, ...given),
    });
    const message = { role, view };
    const act = (name, label) =>
      make("button", { className: "quiet", on: { click: () => this.onAct(name, message) } }, label);
    const actions = role === "assistant"
      ? [act("regenerate", "Answer anew"), act("continue", "Continue")]
      : role === "user" ? [act("answer", "Answer from here")] : [];
    message.element = make("li", { className: `message ${role}` },
      make("div", { className: "role" }, make("span", {}, NAMES[role]),
        make("span", { className: "message-actions" }, ...actions, act("delete", "Delete"))),
      view.element);
    view.set(text, marks);
    this.messages.push(message);
    byId("messages").append(message.element);
    return message;
  }

  cutAfter(message, { inclusive = false } = {}) {
    const place = this.messages.indexOf(message) + (inclusive ? 0 : 1);
    for (const one of this.messages.splice(place)) one.element.remove();
  }

  remove(message) {
    this.messages.splice(this.messages.indexOf(message), 1);
    message.element.remove();
  }

  // Sends the draft; without one goes on with an answer that was begun, or answers what stands there.
  begin() {
    const draft = this.composer.value.trim();
    if (draft) {
      this.composer.value = "";
      this.add("user", draft);
    }
    return this.messages.length ? this.resume() : null;
  }

  // Goes on from what stands there, whatever the draft is.
  resume() {
    const last = this.messages.at(-1);
    return this.request(last?.role === "assistant" ? last : this.add("assistant"));
  }

  // What sending now would ask.
  preview() {
    const messages = this.messages.map(({ role, view }) => ({ role, content: view.text }));
    const draft = this.composer.value.trim();
    if (draft) messages.push({ role: "user", content: draft });
    return messages.at(-1)?.role === "assistant" ? { messages, continue_final_message: true } : { messages };
  }

  request(answer) {
    this.answer = answer;
    this.base = { text: answer.view.text, marks: answer.view.marks };
    const messages = this.messages.map(({ role, view }) => ({ role, content: view.text }));
    if (this.base.text.trim()) return { messages, continue_final_message: true };
    return { messages: messages.slice(0, -1) };
  }

  withProbabilities(body, number) {
    return number ? { ...body, logprobs: true, top_logprobs: number } : body;
  }

  show(candidate) {
    const { text, marks } = this.base;
    this.answer.view.set(text + candidate.text, [...marks, ...candidate.marks(text.length)]);
  }

  branch(view, mark, token, logprob) {
    const message = this.messages.find((one) => one.view === view);
    this.cutAfter(message);
    const kept = view.marks.filter((one) => one.end <= mark.start);
    const taken = { ...mark, end: mark.start + token.length, token, logprob };
    view.set(view.text.slice(0, mark.start) + token, token ? [...kept, taken] : kept);
  }

  lock(isLocked) {
    for (const { view } of this.messages) view.area.readOnly = isLocked;
  }

  focus() {
    this.composer.focus({ preventScroll: true });
  }

  get title() {
    return (this.messages.find((one) => one.role === "user")?.view.text ?? "").trim().slice(0, 80);
  }

  get isEmpty() {
    return !this.messages.length && !this.composer.value;
  }
}
