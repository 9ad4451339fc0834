// Models of other tasks: what they do, instead of texts that go on.

import { byId, make } from "./elements.js";
import { askJson } from "./service.js";

const percent = (value) => `${(100 * value).toFixed(1)} %`;

const lines = (text) => text.split("\n").map((one) => one.trim()).filter(Boolean);

function bar(name, value) {
  const fill = make("i", { className: "probability" });
  fill.style.width = `${100 * Math.min(1, Math.max(0, value))}%`;
  return make("li", { className: "bar-row" }, fill, make("b", {}, name), make("span", {}, percent(value)));
}

const bars = (pairs) => make("ul", { className: "bars" }, ...pairs.map(([name, value]) => bar(name, value)));

const article = (title, ...parts) => make("article", { className: "result" }, make("h3", {}, title), ...parts);

const falling = (scores) => Object.entries(scores).sort((one, other) => other[1] - one[1]);

function drawClasses(answer, texts) {
  // A model that gives a number has one score and no classes.
  return answer.predictions.map(({ scores, score }, index) =>
    article(texts[index], scores ? bars(falling(scores)) : make("p", {}, score.toFixed(3))));
}

function drawFillings(answer, texts) {
  return answer.predictions.map((masks, index) =>
    article(texts[index], ...masks.map((guesses) => bars(guesses.map(({ text, score }) => [text.trim() || text, score])))));
}

function drawLabels(answer, texts) {
  return answer.predictions.map((words, index) => article(texts[index], make("p", { className: "words" },
    ...words.map(({ word, label }) => make("span", { className: label === "O" ? "word" : "word named" }, word, make("small", {}, label))))));
}

function drawChoice(answer, [text, ...choices]) {
  return [article(text, bars(choices.map((choice, index) => [choice, answer.scores[index]])))];
}

function drawAnswer({ answer, start, end, score }, [question, ...context]) {
  const text = context.join("\n");
  // Characters are counted as Python does, not in UTF-16.
  const characters = [...text];
  const part = (from, to) => characters.slice(from, to).join("");
  return [article(`${question} ${answer ? percent(score) : "No answer in this text."}`,
    make("p", { className: "words" }, part(0, start), make("mark", {}, part(start, end)), part(end)))];
}

function drawSimilarity(answer, texts) {
  const head = make("tr", {}, make("td", {}), ...texts.map((_, index) => make("th", { scope: "col" }, String(index + 1))));
  const rows = answer.similarity.map((row, index) => make("tr", {},
    make("th", { scope: "row", title: texts[index] }, `${index + 1}  ${texts[index].slice(0, 40)}`),
    ...row.map((value) => {
      const cell = make("td", {}, value.toFixed(2));
      cell.style.setProperty("--share", `${Math.round(100 * Math.max(0, value))}%`);
      return cell;
    })));
  return [make("table", { className: "matrix" }, make("caption", {}, "Cosine of the angle between two texts"), head, ...rows)];
}

function drawAnything(answer) {
  return [article("Answer", make("pre", {}, JSON.stringify(answer, null, 2)))];
}

// How the service calls a way to draw.
const DRAWINGS = {
  scores: drawClasses, guesses: drawFillings, labels: drawLabels, choice: drawChoice, span: drawAnswer, matrix: drawSimilarity,
};

// The fields of a request out of the lines that were typed, as the form of the model says.
function fieldsOf(form, texts) {
  const rest = [...texts];
  const take = { line: () => rest.shift() ?? "", lines: () => rest.splice(0), rest: () => rest.splice(0).join("\n") };
  return Object.fromEntries(form.fields.map(({ name, takes }) => [name, take[takes]()]));
}

// Whether a model does something else than continuing texts.
export const isOther = (model) => Boolean(model?.form);

let close = null;

// The page of a task; nothing for models that continue texts.
export function openTask(model) {
  const place = byId("task");
  close?.();
  close = null;
  if (!isOther(model)) {
    place.hidden = true;
    return;
  }
  const form = model.form;
  place.hidden = false;
  if (!form.path) {
    place.replaceChildren(make("p", {}, `This page has no form for the task ${model.task}; `,
      make("a", { href: "/docs" }, "the API"), " names its routes."));
    return;
  }
  const hint = form.hint;
  const area = make("textarea", { className: "task-text", rows: 6, placeholder: hint, attributes: { "aria-label": hint } });
  const problem = make("p", { className: "problem", hidden: true, attributes: { role: "alert" } });
  const results = make("div", { className: "results", attributes: { "aria-live": "polite" } });
  const run = async () => {
    const texts = lines(area.value);
    if (!texts.length) return;
    problem.hidden = true;
    try {
      const answer = await askJson(form.path, { body: { model: model.model, ...fieldsOf(form, texts) } });
      results.replaceChildren(...(DRAWINGS[form.show] ?? drawAnything)(answer, texts));
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
  };
  const button = make("button", { className: "primary", on: { click: run } }, form.verb, " ", make("kbd", {}, "Ctrl ⏎"));
  const onKey = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  };
  place.addEventListener("keydown", onKey);
  close = () => place.removeEventListener("keydown", onKey);
  place.replaceChildren(area, make("div", { className: "actions" }, button), problem, results);
}
