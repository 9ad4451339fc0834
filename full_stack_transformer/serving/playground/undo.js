// Undo and redo of the texts on the page, of typing and of answers alike.

const MAX_STEPS = 200;
const TYPING_MILLISECONDS = 800;

export class Undo {
  // take() returns the texts as they are now, put(texts) shows others; onChange() after each new step.
  constructor({ take, put, onChange }) {
    Object.assign(this, { take, put, onChange });
    this.clear();
  }

  clear() {
    this.past = [];
    this.future = [];
    this.typedAt = -Infinity;
  }

  remember() {
    this.past.push(this.take());
    if (this.past.length > MAX_STEPS) this.past.shift();
    this.future = [];
    this.typedAt = -Infinity;
    this.onChange();
  }

  // One step for what is typed without a pause.
  rememberTyping() {
    const now = performance.now();
    if (now - this.typedAt > TYPING_MILLISECONDS) this.remember();
    this.typedAt = now;
  }

  undo() {
    this.travel(this.past, this.future);
  }

  redo() {
    this.travel(this.future, this.past);
  }

  travel(from, to) {
    if (!from.length) return;
    to.push(this.take());
    this.put(from.pop());
    this.typedAt = -Infinity;
  }
}
