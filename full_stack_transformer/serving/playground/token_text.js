// A text that can be edited like any other, over a layer that tints its tokens.
//
// The upper layer is a plain textarea, so typing, selecting, screen readers and phones work as they do
// everywhere. The lower one holds the same text in spans, invisible but for their backgrounds.

import { make } from "./elements.js";

const BOUNDS = [1, 2, 4, 6, 9];

// How surprising: 0 for at most one bit, 5 for more than nine.
const heatOf = (logprob) => {
  const bits = -logprob / Math.LN2;
  const place = BOUNDS.findIndex((bound) => bits <= bound);
  return place < 0 ? BOUNDS.length : place;
};

const isSame = (one, other) =>
  one === other || (one.start === other.start && one.end === other.end &&
    one.logprob === other.logprob && one.made === other.made);

// What is left of marks after an edit: everything before it; after it, only who wrote what.
function marksAfterEdit(marks, before, after) {
  const most = Math.min(before.length, after.length);
  let prefix = 0;
  while (prefix < most && before[prefix] === after[prefix]) prefix += 1;
  let suffix = 0;
  while (suffix < most - prefix && before.at(-1 - suffix) === after.at(-1 - suffix)) suffix += 1;
  const moved = after.length - before.length;
  const behind = before.length - suffix;
  return marks.flatMap((mark) => {
    if (mark.end <= prefix) return [mark];
    if (mark.start < behind || !mark.made) return [];
    return [{ start: mark.start + moved, end: mark.end + moved, made: true }];
  });
}

export class TokenText {
  // onEdit() after typing; beforeEdit() before it; onToken(mark, rectangle, how) when one is pointed at.
  constructor({ label, placeholder = "", readOnly = false, onEdit, beforeEdit, onToken }) {
    this.area = make("textarea", {
      className: "area", placeholder, readOnly, rows: 1, spellcheck: false,
      attributes: { "aria-label": label, autocapitalize: "off" },
    });
    this.layer = make("div", { className: "layer", attributes: { "aria-hidden": "true" } });
    this.tail = make("span", { className: "tail" });
    this.layer.append(this.tail);
    this.element = make("div", { className: "token-text" }, this.layer, this.area);
    this.marks = [];
    this.text = "";
    this.spans = [];
    this.onToken = onToken;
    this.area.addEventListener("beforeinput", () => beforeEdit?.());
    this.area.addEventListener("input", () => {
      const after = this.area.value;
      this.draw(after, marksAfterEdit(this.marks, this.text, after));
      onEdit?.();
    });
    this.area.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && !event.buttons) this.point(event, "hover");
    });
    this.area.addEventListener("pointerleave", () => onToken?.(null, null, "leave"));
    this.area.addEventListener("click", (event) => this.point(event, "click"));
    this.area.addEventListener("keydown", (event) => {
      if (event.altKey && event.key === "ArrowDown") {
        event.preventDefault();
        this.showAtCaret();
      }
    });
  }

  set(text, marks) {
    if (this.area.value !== text) this.area.value = text;
    this.draw(text, marks);
  }

  // Draws anew only what has changed, which in a stream is the end.
  draw(text, marks) {
    let same = 0;
    while (same < marks.length && same < this.marks.length && isSame(marks[same], this.marks[same])) same += 1;
    const kept = same ? marks[same - 1].end : 0;
    if (this.text.slice(0, kept) !== text.slice(0, kept)) same = 0;
    while (this.spans.length > same) this.spans.pop().remove();
    let end = same ? marks[same - 1].end : 0;
    this.tail.replaceChildren();
    for (const mark of marks.slice(same)) {
      const span = make("span", {});
      if (mark.start > end) span.append(text.slice(end, mark.start));
      const token = make("span", { className: mark.made ? "token made" : "token" }, text.slice(mark.start, mark.end));
      if (mark.logprob !== undefined) token.classList.add(`h${heatOf(mark.logprob)}`);
      token.mark = mark;
      span.append(token);
      this.spans.push(span);
      this.tail.before(span);
      end = mark.end;
    }
    // A last empty line has height only with something on it.
    this.tail.append(text.slice(end), "\u200b");
    this.text = text;
    // The spans that were kept know the marks of before, which are equal.
    this.marks = [...this.marks.slice(0, same), ...marks.slice(same)];
  }

  spanAt(x, y) {
    return document.elementsFromPoint(x, y).find((one) => one.mark && this.layer.contains(one));
  }

  point(event, how) {
    const span = this.spanAt(event.clientX, event.clientY);
    this.show(span, how, event);
  }

  show(span, how, event) {
    if (!span || span.mark.logprob === undefined) {
      this.onToken?.(null, null, how);
      return;
    }
    // A token may run over two lines: the box of the line pointed at.
    const boxes = [...span.getClientRects()];
    const box = boxes.find((one) => event && event.clientY >= one.top && event.clientY <= one.bottom);
    this.onToken?.(span.mark, box ?? boxes[0], how);
  }

  showAtCaret() {
    const place = this.area.selectionStart;
    const known = this.marks.filter((mark) => mark.logprob !== undefined);
    const mark = known.findLast((one) => one.start <= place) ?? known[0];
    const found = this.spans.map((span) => span.lastChild).find((token) => token.mark === mark);
    this.show(found, "keyboard");
  }
}
