// The form of sampling parameters, drawn from the schema that the service publishes.

import { byId, make } from "./elements.js";

// What the page itself decides, or draws elsewhere.
const OWN = new Set(["prompt", "messages", "model", "stream", "stream_options", "echo", "logprobs", "top_logprobs",
  "best_of", "continue_final_message"]);
const FIRST = ["max_tokens", "temperature", "top_p", "repetition_penalty", "n", "seed", "stop"];
// Where a slider ends that would be useless up to the bound; the number field goes further.
const SLIDER_ENDS = { temperature: 2, top_k: 200, repetition_penalty: 2, n: 8, min_tokens: 256 };
// The service's names of parameters that have others in the body.
const NAME_AT_MODEL = { max_tokens: "max_new_tokens", min_tokens: "min_new_tokens" };
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
  "frequency_penalty"];
const NEUTRAL = { temperature: 1, top_p: 1, top_k: 0, min_p: 0, typical_p: 1, repetition_penalty: 1, presence_penalty: 0,
  frequency_penalty: 0 };
export const PRESETS = {
  model: { label: "The model's own settings", values: {} },
  precise: { label: "Precise: the most likely token", values: { ...NEUTRAL, temperature: 0, repetition_penalty: 1.1 } },
  inventive: { label: "Inventive", values: { ...NEUTRAL, temperature: 1.1, min_p: 0.05, repetition_penalty: 1.05 } },
  neutral: { label: "The model's own probabilities", values: NEUTRAL },
};

// One field of the schema, without the "or null" that OpenAI's clients may send.
function fieldOf(name, schema) {
  const kinds = (schema.anyOf ?? [schema]).filter((one) => one.type !== "null");
  const kind = kinds.find((one) => one.type === "array") ?? kinds[0] ?? {};
  return {
    name,
    type: kind.type,
    items: kind.items?.type,
    least: kind.minimum ?? kind.exclusiveMinimum,
    isAbove: kind.exclusiveMinimum !== undefined,
    most: kind.maximum,
    schemaDefault: schema.default ?? null,
    standard: null,
    meaning: schema.description ?? "",
    unit: schema["x-unit"] ?? "",
  };
}

export class Parameters {
  // `schema` of a route's body; `model` as /version describes it; onChange() after each change by the user.
  constructor(schema, { model, isChat, onChange }) {
    this.contextTokens = model.context_tokens;
    this.onChange = onChange;
    this.fields = Object.entries(schema.properties)
      .filter(([name, one]) => !OWN.has(name) && !/ignored\.|^Refused/.test(one.description ?? ""))
      .map(([name, one]) => fieldOf(name, one));
    this.inputs = new Map();
    this.draw();
    this.useModel(model, { isChat });
    this.set({});
  }

  // What the model does with a parameter that is left out; what nobody has changed follows it.
  useModel(model, { isChat = false } = {}) {
    const chosen = this.values();
    const sampling = isChat ? model.chat_sampling : model.sampling;
    for (const field of this.fields) {
      field.standard = sampling?.[NAME_AT_MODEL[field.name] ?? field.name] ?? field.schemaDefault;
      if (!(field.name in chosen)) this.put(field.name, field.standard);
    }
    this.showPreset();
  }

  draw() {
    const [first, more] = [[], []];
    for (const field of this.fields) (FIRST.includes(field.name) ? first : more).push(field);
    first.sort((one, other) => FIRST.indexOf(one.name) - FIRST.indexOf(other.name));
    this.preset = make("select", { id: "preset", on: { change: () => this.usePreset() } },
      ...Object.entries(PRESETS).map(([value, { label }]) => make("option", { value }, label)),
      make("option", { value: "own" }, "Your own"));
    this.topTokens = make("input", { type: "number", id: "alternatives-wanted", min: 0, max: 20, step: 1, value: 5 });
    byId("parameters").replaceChildren(
      make("label", { className: "field" }, make("span", { className: "name" }, "Preset"), this.preset),
      ...first.map((field) => this.row(field)),
      make("div", { className: "field" },
        make("div", { className: "head" },
          make("label", { className: "name", htmlFor: "alternatives-wanted" }, "alternatives"), this.topTokens),
        make("p", { className: "meaning" }, "Shown for each token; 0 to ask for no probabilities.")),
      make("details", { className: "more" }, make("summary", {}, "More"), ...more.map((field) => this.row(field))),
    );
    byId("parameters").addEventListener("input", (event) => {
      if (event.target === this.preset) return;
      this.showPreset();
      this.onChange();
    });
    byId("parameters").addEventListener("submit", (event) => event.preventDefault());
  }

  row(field) {
    const { name, unit, meaning } = field;
    const id = `parameter-${name}`;
    const parts = this.controls(field, id);
    this.inputs.set(name, { field, ...parts });
    return make("div", { className: "field" },
      make("div", { className: "head" },
        make("label", { className: "name", htmlFor: id }, name), make("span", { className: "unit" }, unit), parts.input),
      ...(parts.slider ? [parts.slider] : []),
      make("p", { className: "meaning", id: `${id}-meaning` }, meaning));
  }

  controls(field, id) {
    const { name, type, least, most } = field;
    const described = { "aria-describedby": `${id}-meaning` };
    if (type === "boolean") return { input: make("input", { id, type: "checkbox", attributes: described }) };
    if (type === "string") return { input: make("input", { id, attributes: described }) };
    if (type === "array") {
      const title = "One a line; \\n is a line break";
      return { input: make("textarea", { id, rows: 1, title, placeholder: "one a line", spellcheck: false, attributes: described }) };
    }
    if (type !== "number" && type !== "integer") {
      return { input: make("textarea", { id, rows: 1, placeholder: "JSON", spellcheck: false, attributes: described }) };
    }
    const step = type === "integer" ? 1 : 0.01;
    const input = make("input", { id, type: "number", step: type === "integer" ? 1 : "any", attributes: described });
    if (least !== undefined) input.min = least;
    if (most !== undefined) input.max = most;
    if (name === "seed") {
      input.placeholder = "random";
      return { input };
    }
    const end = name === "max_tokens" ? this.contextTokens : SLIDER_ENDS[name] ?? most;
    if (!(end <= 1e5)) return { input };
    const start = field.isAbove ? least + step : name === "max_tokens" ? 1 : least;
    const slider = make("input", {
      type: "range", min: start, max: end, step, tabIndex: -1, attributes: { "aria-label": `${name}, slider` },
    });
    slider.addEventListener("input", () => { input.value = slider.value; });
    input.addEventListener("input", () => { slider.value = input.value; });
    return { input, slider };
  }

  put(name, value) {
    const entry = this.inputs.get(name);
    if (!entry) return;
    const { field, input, slider } = entry;
    if (field.type === "boolean") input.checked = Boolean(value);
    else if (value === null || value === undefined) input.value = "";
    else if (field.type === "array") {
      const lines = Array.isArray(value) ? value : [value];
      input.value = lines.map((one) => one.replaceAll("\\", "\\\\").replaceAll("\n", "\\n")).join("\n");
    } else input.value = typeof value === "object" ? JSON.stringify(value) : value;
    if (slider) slider.value = input.value;
  }

  set(values) {
    for (const { name, standard } of this.fields) this.put(name, values[name] ?? standard);
    if (values.alternatives !== undefined) this.topTokens.value = values.alternatives;
    this.showPreset();
  }

  usePreset() {
    const chosen = PRESETS[this.preset.value];
    if (!chosen) return;
    for (const { name, standard } of this.fields) {
      if (SAMPLING.includes(name)) this.put(name, chosen.values[name] ?? standard);
    }
    this.onChange();
  }

  showPreset() {
    const now = this.values();
    const standards = new Map(this.fields.map((field) => [field.name, field.standard]));
    const found = Object.entries(PRESETS).find(([, { values }]) =>
      SAMPLING.every((name) => (now[name] ?? standards.get(name)) === (values[name] ?? standards.get(name))));
    this.preset.value = found?.[0] ?? "own";
  }

  // What was chosen, without what the model does anyway.
  values() {
    const chosen = {};
    for (const [name, { field, input }] of this.inputs) {
      const value = readInput(field, input);
      if (value === undefined || JSON.stringify(value) === JSON.stringify(field.standard)) continue;
      chosen[name] = value;
    }
    return chosen;
  }

  // As values, and with what is no part of a request.
  state() {
    return { ...this.values(), alternatives: this.numAlternatives };
  }

  get numAlternatives() {
    return Math.min(20, Math.max(0, Math.trunc(Number(this.topTokens.value)) || 0));
  }
}

function readInput(field, input) {
  if (field.type === "boolean") return input.checked;
  const text = input.value;
  if (field.type === "array") {
    const lines = text.split("\n").filter(Boolean)
      .map((line) => line.replace(/\\(.)/g, (_, one) => (one === "n" ? "\n" : one === "t" ? "\t" : one)));
    return lines.length ? lines : undefined;
  }
  if (text === "") return undefined;
  if (field.type === "number" || field.type === "integer") {
    const number = Number(text);
    return Number.isFinite(number) ? number : undefined;
  }
  if (field.type === "string") return text;
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // while it is being typed
  }
}
