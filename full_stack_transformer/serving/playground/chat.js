// The chat: a tree of messages, of which one path is shown. Editing and answering anew make branches.
//
//   system prompt
//   └── you ─── model            what is shown: the path from the root to the leaf
//       │  └─── model (anew)
//       └ you (edited) ── model

import { byId, count, make } from "./elements.js";
import { copyText, Prose } from "./markdown.js";
import { TokenText } from "./token_text.js";

const NAMES = { user: "You", assistant: "Model" };

export class Chat {
  // onEdit() after each change; onToken(view, …) when one is pointed at; onAct(name, node, text) for buttons.
  constructor({ onEdit, onToken, onAct }) {
    Object.assign(this, { onEdit, onToken, onAct });
    this.mode = "chat";
    this.path = "/v1/chat/completions";
    this.composer = byId("message");
    this.system = byId("system");
    this.messages = []; // what is on the page: {node, view, prose, element}
    this.restore();
  }

  // ---------------------------------------------------------------- the tree

  snapshot() {
    return { nodes: this.nodes.map((one) => ({ ...one })), leaf: this.leaf?.id ?? null, system: this.system.value, draft: this.composer.value };
  }

  restore(saved = {}) {
    const { nodes, leaf, system } = saved.messages ? fromMessages(saved.messages) : saved;
    this.nodes = (nodes ?? []).map((one) => ({ ...one }));
    this.leaf = this.nodes.find((one) => one.id === leaf) ?? this.nodes.at(-1) ?? null;
    this.system.value = system ?? "";
    byId("system-box").open = Boolean(system);
    this.composer.value = saved.draft ?? "";
    this.grow();
    for (const one of this.messages.splice(0)) one.element.remove();
    this.draw();
  }

  children(node) {
    return this.nodes.filter((one) => one.parent === (node?.id ?? null));
  }

  parentOf(node) {
    return this.nodes.find((one) => one.id === node.parent) ?? null;
  }

  get shownPath() {
    const path = [];
    for (let node = this.leaf; node; node = this.parentOf(node)) path.unshift(node);
    return path;
  }

  add(role, text, parent, marks = []) {
    const id = 1 + Math.max(0, ...this.nodes.map((one) => one.id));
    const node = { id, parent: parent?.id ?? null, role, text, marks };
    this.nodes.push(node);
    this.leaf = node;
    this.draw();
    return node;
  }

  // The branch beside this one; of what follows in it the latest.
  turn(node, steps) {
    const siblings = this.children(this.parentOf(node));
    let next = siblings[siblings.indexOf(node) + steps];
    while (next && this.children(next).length) next = this.children(next).at(-1);
    this.leaf = next ?? this.leaf;
    this.draw();
  }

  remove(node) {
    const parent = this.parentOf(node);
    const gone = new Set([node.id]);
    for (const one of this.nodes) if (gone.has(one.parent)) gone.add(one.id);
    this.nodes = this.nodes.filter((one) => !gone.has(one.id));
    const sibling = this.children(parent).at(-1);
    this.leaf = sibling ?? parent;
    while (this.leaf && this.children(this.leaf).length) this.leaf = this.children(this.leaf).at(-1);
    this.draw();
  }

  // ---------------------------------------------------------------- what is asked

  listed(path) {
    const system = this.system.value.trim();
    const messages = path.map(({ role, text }) => ({ role, content: text }));
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  // Sends the draft; without one goes on with an answer that was begun, or answers what stands there.
  begin() {
    const draft = this.composer.value.trim();
    if (draft) {
      this.composer.value = "";
      this.grow();
      this.add("user", draft, this.leaf);
    }
    return this.leaf ? this.resume() : null;
  }

  resume() {
    return this.leaf.role === "assistant" ? this.request(this.leaf) : this.answerTo(this.leaf);
  }

  // A new answer, beside those that there are.
  answerTo(node) {
    return this.request(this.add("assistant", "", node));
  }

  request(answer) {
    this.leaf = answer;
    this.answer = answer;
    this.base = { text: answer.text, marks: answer.marks };
    this.draw();
    const path = this.shownPath;
    if (this.base.text.trim()) return { messages: this.listed(path), continue_final_message: true };
    return { messages: this.listed(path.slice(0, -1)) };
  }

  // What sending now would ask.
  preview() {
    const draft = this.composer.value.trim();
    const path = this.shownPath;
    if (draft) path.push({ role: "user", text: draft });
    const messages = this.listed(path);
    return path.at(-1)?.role === "assistant" ? { messages, continue_final_message: true } : { messages };
  }

  // Probabilities only where they are shown: an answer is twenty times as large with them.
  withProbabilities(body, number) {
    const usage = { stream_options: { include_usage: true, continuous_usage_stats: true } };
    const wants = number && document.body.dataset.colour === "probability";
    return { ...body, ...usage, ...(wants ? { logprobs: true, top_logprobs: number } : {}) };
  }

  show(candidate) {
    const { text, marks } = this.base;
    this.answer.text = text + candidate.text;
    this.answer.marks = [...marks, ...candidate.marks(text.length)];
    this.answer.used = candidate.used ?? this.answer.used;
    this.answer.isCut = candidate.finish === "length";
    this.draw();
  }

  // Another token in place of `mark`, in a branch.
  branch(view, mark, token, logprob) {
    const { node } = this.messages.find((one) => one.view === view);
    const kept = node.marks.filter((one) => one.end <= mark.start);
    const taken = { ...mark, end: mark.start + token.length, token, logprob };
    this.add(node.role, node.text.slice(0, mark.start) + token, this.parentOf(node), token ? [...kept, taken] : kept);
  }

  // ---------------------------------------------------------------- the page

  // Messages of the path; those that stand there already are kept.
  draw() {
    const path = this.shownPath;
    let same = 0;
    while (same < path.length && this.messages[same]?.node === path[same]) same += 1;
    for (const one of this.messages.splice(same)) one.element.remove();
    for (const node of path.slice(same)) this.messages.push(this.message(node));
    for (const one of this.messages) this.update(one);
    byId("welcome").hidden = path.length > 0;
    this.drawContext();
  }

  message(node) {
    const view = new TokenText({
      label: `Message: ${NAMES[node.role]}`, readOnly: true, onToken: (...given) => this.onToken(view, ...given),
    });
    const prose = new Prose();
    const actions = make("span", { className: "message-actions" });
    const branches = make("span", { className: "branches" });
    const body = make("div", { className: "said" }, prose.element, view.element);
    const element = make("li", { className: `message ${node.role}` },
      make("div", { className: "role" }, make("span", {}, NAMES[node.role])), body,
      make("div", { className: "under" }, branches, actions));
    byId("messages").append(element);
    return { node, view, prose, element, actions, branches, body, text: null };
  }

  update(message) {
    const { node, view, prose } = message;
    if (message.text !== node.text || view.marks.length !== node.marks.length) {
      message.text = node.text;
      prose.set(node.text);
      view.set(node.text, node.marks);
    }
    const siblings = this.children(this.parentOf(node));
    const isLast = node === this.leaf;
    const state = `${siblings.indexOf(node)}/${siblings.length}/${isLast}/${node.isCut}`;
    if (message.state === state) return;
    message.state = state;
    this.drawBranches(message, siblings);
    this.drawActions(message, isLast);
  }

  drawBranches({ node, branches }, siblings) {
    const place = siblings.indexOf(node);
    const step = (sign, label, steps) => make("button", {
      className: "quiet", disabled: !siblings[place + steps], attributes: { "aria-label": label },
      on: { click: () => this.onAct("turn", node, steps) },
    }, sign);
    branches.replaceChildren(...(siblings.length < 2 ? [] : [
      step("‹", "The branch before", -1), make("span", {}, `${place + 1}/${siblings.length}`), step("›", "The next branch", 1),
    ]));
  }

  drawActions(message, isLast) {
    const { node, actions } = message;
    const button = (label, click) => make("button", { className: "quiet", on: { click } }, label);
    const act = (name, label) => button(label, () => this.onAct(name, node));
    const copy = button("Copy", () => copyText(node.text, copy));
    const own = node.role === "assistant"
      ? [act("regenerate", "Answer anew"), ...(isLast ? [act("continue", "Continue")] : [])]
      : [];
    actions.replaceChildren(copy, button("Edit", () => this.edit(message)), ...own, act("delete", "Delete"));
    message.element.classList.toggle("cut", isLast && Boolean(node.isCut));
  }

  // A box in place of the message; what is sent from it becomes a branch.
  edit(message) {
    const { node, element, body } = message;
    if (element.classList.contains("editing")) return;
    const area = make("textarea", { value: node.text, attributes: { "aria-label": `Edit: ${NAMES[node.role]}` } });
    const close = () => {
      box.remove();
      element.classList.remove("editing");
    };
    const send = () => {
      close();
      this.onAct("edit", node, area.value);
    };
    const box = make("form", { className: "editor", on: { submit: (event) => { event.preventDefault(); send(); } } }, area,
      make("div", { className: "actions" },
        make("button", { className: "primary" }, node.role === "user" ? "Send" : "Save"),
        make("button", { type: "button", on: { click: close } }, "Cancel")));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (isSending(event) && node.role === "user") {
        event.preventDefault();
        send();
      }
    });
    element.classList.add("editing");
    body.after(box);
    area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight / 2)}px`;
    area.focus();
  }

  drawContext() {
    const used = this.shownPath.findLast((one) => one.used)?.used;
    const place = byId("context");
    place.hidden = !used || !this.contextTokens;
    if (place.hidden) return;
    place.replaceChildren(
      make("meter", { min: 0, max: this.contextTokens, high: 0.9 * this.contextTokens, value: used, attributes: { "aria-hidden": "true" } }),
      `${used.toLocaleString("en")} of ${count(this.contextTokens, "token")}`);
    place.title = "Tokens of this conversation, of those that the model can read";
  }

  useModel(model) {
    this.contextTokens = model.context_tokens;
    byId("welcome-model").textContent = model.model;
    this.drawContext();
  }

  // The box of the draft is as high as its text, up to a part of the page.
  grow() {
    this.composer.style.height = "auto";
    this.composer.style.height = `${Math.min(this.composer.scrollHeight + 2, innerHeight * 0.4)}px`;
  }

  // A text into the draft, where the caret is.
  insert(text) {
    this.composer.setRangeText(text, this.composer.selectionStart, this.composer.selectionEnd, "end");
    this.grow();
    this.onEdit();
    this.focus();
  }

  lock() {}

  focus() {
    this.composer.focus({ preventScroll: true });
  }

  get title() {
    return (this.nodes.find((one) => one.role === "user")?.text ?? "").trim().slice(0, 80);
  }

  get isEmpty() {
    return !this.nodes.length && !this.composer.value && !this.system.value;
  }
}

// Enter sends and Shift Enter makes a line; on a phone, which has no such keys, a button sends.
export function isSending(event) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey || event.altKey) return false;
  return event.ctrlKey || event.metaKey || !matchMedia("(pointer: coarse) and (hover: none)").matches;
}

// What earlier versions of the page saved: a list of messages.
function fromMessages(messages) {
  const said = messages.filter((one) => one.role !== "system");
  return {
    nodes: said.map(({ role, text, marks }, index) => ({ id: index + 1, parent: index || null, role, text, marks: marks ?? [] })),
    leaf: said.length,
    system: messages.find((one) => one.role === "system")?.text ?? "",
  };
}
