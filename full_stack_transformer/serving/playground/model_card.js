// Which model this is, what the service does now, and a note when the model was replaced.

import { byId, count, make } from "./elements.js";
import { ask, askJson } from "./service.js";

const LOAD_MILLISECONDS = 3000;
const FACTS_EVERY = 3;

const figure = (number, digits = 3) => (number === null || number === undefined ? null : number.toFixed(digits));

function factsOf(model, packageVersion) {
  const { description } = model;
  const dataset = description.dataset ?? {};
  const tokens = dataset.number_of_train_tokens;
  return [
    ["Model", model.model],
    ["Adapter of", model.parent],
    ["Opened from", model.checkpoint],
    ["Task", model.task],
    ["Step", model.step?.toLocaleString("en")],
    ["Validation loss", figure(model.validation_loss, 4)],
    ["Validation perplexity", figure(description.validation_perplexity ?? (model.validation_loss === null ? null : Math.exp(model.validation_loss)), 2)],
    ["Bits per byte", figure(description.validation_bits_per_byte)],
    ["Dataset", dataset.dataset_name],
    ["Train tokens", tokens?.toLocaleString("en")],
    ["Train samples", dataset.number_of_train_samples?.toLocaleString("en")],
    ["Vocabulary", dataset.vocab_size?.toLocaleString("en")],
    ["Context", count(model.context_tokens, "token")],
    ["Chat template", model.has_chat_template ? "yes" : "none: a notebook model"],
    ["Computed by", model.computed_by],
    ["Loaded", new Date(model.loaded_at * 1000).toLocaleString()],
    ["Service", `full_stack_transformer ${packageVersion}`],
  ].filter(([, value]) => value !== undefined && value !== null && value !== "");
}

function lineOf(model) {
  const { dataset_name: name, number_of_train_tokens: tokens } = model.description.dataset ?? {};
  const parts = [model.model];
  if (model.step !== null) parts.push(`step ${model.step.toLocaleString("en")}`);
  if (model.validation_loss !== null) parts.push(`validation loss ${figure(model.validation_loss)}`);
  if (tokens) parts.push(`${count(tokens, "token")} of ${name}`);
  return parts.join(" · ");
}

const sum = (text, name) => {
  let total = 0;
  for (const line of text.split("\n")) {
    if (line.startsWith(`${name} `) || line.startsWith(`${name}{`)) total += Number(line.slice(line.lastIndexOf(" ") + 1));
  }
  return total;
};

export class ModelCard {
  // onModels(models) whenever there are others.
  constructor({ onModels }) {
    this.onModels = onModels;
    this.models = [];
    this.shown = null;
    this.last = null;
    this.turn = 0;
  }

  async read(options) {
    const version = await askJson("/version", options);
    const before = new Map(this.models.map((one) => [one.model, one]));
    this.models = version.models;
    this.packageVersion = version.package_version;
    for (const model of this.models) {
      const old = before.get(model.model);
      if (old && (old.num_swaps !== model.num_swaps || old.loaded_at !== model.loaded_at)) this.tell(old, model);
    }
    if (JSON.stringify([...before.values()]) !== JSON.stringify(this.models)) this.onModels(this.models);
  }

  find(name) {
    return this.models.find((one) => one.model === name) ?? this.models[0];
  }

  show(name) {
    const model = this.find(name);
    byId("card-line").textContent = lineOf(model);
    byId("card-facts").replaceChildren(...factsOf(model, this.packageVersion).map(([term, value]) =>
      make("div", {}, make("dt", {}, term), make("dd", {}, String(value)))));
    document.title = `${model.model} · Playground`;
  }

  tell(old, model) {
    const loss = model.validation_loss === null ? "" : `, validation loss ${figure(model.validation_loss)} (before: ${figure(old.validation_loss) ?? "unknown"})`;
    byId("note").textContent = `A newer ${model.model} is served now: step ${model.step}${loss}. Texts from before are of the old one.`;
    byId("note").hidden = false;
  }

  // Forever, but only while the page is visible.
  watch() {
    setInterval(() => {
      if (!document.hidden) this.look().catch(() => this.showLoad(null));
    }, LOAD_MILLISECONDS);
    this.look().catch(() => this.showLoad(null));
  }

  async look() {
    this.turn += 1;
    if (this.turn % FACTS_EVERY === 0) await this.read({ quietly: true });
    const text = await (await ask("/metrics", { quietly: true })).text();
    const now = performance.now();
    const made = sum(text, "vllm:generation_tokens_total");
    const speed = this.last ? ((made - this.last.made) / (now - this.last.now)) * 1000 : 0;
    this.last = { made, now };
    this.showLoad({
      running: sum(text, "vllm:num_requests_running"),
      waiting: sum(text, "vllm:num_requests_waiting"),
      speed,
    });
  }

  showLoad(load) {
    const live = byId("live");
    live.classList.toggle("busy", Boolean(load?.running));
    live.textContent = load === null
      ? "no answer"
      : `${load.running} running · ${load.waiting} waiting · ${Math.round(load.speed)} tokens/s`;
  }
}
