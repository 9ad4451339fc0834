// Sessions: saved while one works, listed, opened, deleted, exported and imported.

import { byId, make } from "./elements.js";
import { exported, imported, openHistory } from "./history.js";

const SAVE_MILLISECONDS = 400;
const CURRENT = "fst.session"; // in localStorage: the id of the open one

function textOf({ title, notebook, chat }) {
  const said = (chat?.nodes ?? chat?.messages ?? []).map((one) => one.text);
  return [title, notebook?.text ?? "", chat?.system ?? "", ...said].join("\n").toLowerCase();
}

export class Sessions {
  // take() returns what to save, none while there is nothing; show(session) puts one onto the page;
  // onOpen() when one was chosen; onProblem(error) or onProblem(null).
  constructor({ take, show, onOpen, onProblem }) {
    Object.assign(this, { take, show, onOpen, onProblem });
    this.current = null;
    this.timer = 0;
  }

  async begin() {
    this.history = await openHistory();
    const id = localStorage.getItem(CURRENT);
    this.open((await this.history.all()).find((one) => one.id === id));
  }

  open(wanted, mode) {
    this.current = wanted ?? { id: crypto.randomUUID?.() ?? String(Math.random()), mode, updated: 0 };
    this.show(this.current);
  }

  async new(mode) {
    await this.save();
    this.open(null, mode);
    localStorage.removeItem(CURRENT);
  }

  // Saves soon; later while a text grows.
  touch({ isGrowing }) {
    document.body.dataset.saved = "no";
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save(), isGrowing ? 4 * SAVE_MILLISECONDS : SAVE_MILLISECONDS);
  }

  async save() {
    clearTimeout(this.timer);
    const taken = this.current && this.take();
    if (!taken || (taken.isEmpty && !this.current.updated)) return;
    delete taken.isEmpty;
    Object.assign(this.current, taken, { updated: Date.now() });
    try {
      await this.history.put(this.current);
      localStorage.setItem(CURRENT, this.current.id);
      document.body.dataset.saved = "yes";
      if (!byId("history").hidden) await this.drawList();
    } catch (error) {
      this.onProblem(new Error(`This browser does not keep the text: ${error.message}`));
    }
  }

  // The list at the side, of those that have the searched words.
  async list() {
    await this.save();
    await this.drawList();
  }

  async drawList() {
    const all = (await this.history.all()).sort((one, other) => other.updated - one.updated);
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = all.filter((one) => {
      const text = textOf(one);
      return words.every((word) => text.includes(word));
    });
    byId("sessions").replaceChildren(...found.map((one) => this.row(one)));
    if (!found.length) byId("sessions").append(make("li", { className: "meaning" }, all.length ? "Nothing is like this." : "Nothing yet."));
  }

  row(one) {
    const open = () => {
      this.open(one);
      this.touch({ isGrowing: false });
      this.drawList();
      this.onOpen();
    };
    return make("li", {},
      make("button", {
        className: "session", attributes: one.id === this.current.id ? { "aria-current": "true" } : {}, on: { click: open },
      }, make("b", {}, one.title), make("span", { className: "meaning" },
        `${one.mode} · ${new Date(one.updated).toLocaleString()}`)),
      make("button", {
        className: "quiet", title: "Delete", attributes: { "aria-label": `Delete ${one.title}` }, on: { click: () => this.remove(one) },
      }, "✕"));
  }

  async remove(one) {
    await this.history.remove(one.id);
    if (one.id === this.current.id) this.open(null, one.mode);
    await this.list();
  }

  async exportAll() {
    await this.save();
    const url = URL.createObjectURL(new Blob([exported(await this.history.all())], { type: "application/json" }));
    const day = new Date().toISOString().slice(0, 10);
    make("a", { href: url, download: `playground-${day}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  async importFile() {
    const [file] = byId("import-file").files;
    byId("import-file").value = "";
    if (!file) return;
    try {
      for (const one of imported(await file.text())) await this.history.put(one);
      await this.list();
    } catch (error) {
      this.onProblem(new Error(`${file.name} is not an export of this page: ${error.message}`));
    }
  }
}
