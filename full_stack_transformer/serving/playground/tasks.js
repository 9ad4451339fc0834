// Models of other tasks: what they do, instead of texts that go on.

import { byId, make } from "./elements.js";
import { askJson } from "./service.js";

const percent = (value) => `${(100 * value).toFixed(1)} %`;

const lines = (text) => text.split("\n").map((one) => one.trim()).filter(Boolean);

function bar(name, value) {
  const fill = make("i", { className: "probability" });
  fill.style.width = percent(Math.min(1, Math.max(0, value)));
  return make("li", { className: "bar-row" }, fill, make("b", {}, name), make("span", {}, percent(value)));
}

const bars = (pairs) => make("ul", { className: "bars" }, ...pairs.map(([name, value]) => bar(name, value)));

function drawLabels(answer, texts) {
  return answer.predictions.map(({ scores }, index) => make("article", { className: "result" },
    make("h3", {}, texts[index]), bars(Object.entries(scores).sort((one, other) => other[1] - one[1]))));
}

function drawFillings(answer, texts) {
  return answer.predictions.map((fillings, index) => make("article", { className: "result" },
    make("h3", {}, texts[index]), bars(fillings.map(({ token, score }) => [token, score]))));
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

const TASKS = {
  sequence_classification: { path: "/classify", verb: "Classify", hint: "One text a line …", draw: drawLabels },
  masked_lm: { path: "/fill_mask", verb: "Fill in", hint: "One text a line, with a mask in it …", draw: drawFillings },
  sentence_embedding: { path: "/similarity", verb: "Compare", hint: "Two or more texts, one a line …", draw: drawSimilarity },
};

export const isOther = (task) => task !== "causal_lm";

let close = null;

// The page of a task; nothing for models that continue texts.
export function openTask(model) {
  const place = byId("task");
  close?.();
  close = null;
  if (!isOther(model.task)) {
    place.hidden = true;
    return;
  }
  const task = TASKS[model.task];
  place.hidden = false;
  if (!task) {
    place.replaceChildren(make("p", {}, `This page has no form for the task ${model.task}; `,
      make("a", { href: "/docs" }, "the API"), " names its routes."));
    return;
  }
  const area = make("textarea", { className: "task-text", rows: 6, placeholder: task.hint, attributes: { "aria-label": task.hint } });
  const problem = make("p", { className: "problem", hidden: true, attributes: { role: "alert" } });
  const results = make("div", { className: "results", attributes: { "aria-live": "polite" } });
  const run = async () => {
    const texts = lines(area.value);
    if (!texts.length) return;
    problem.hidden = true;
    try {
      const answer = await askJson(task.path, { body: { model: model.model, texts } });
      results.replaceChildren(...task.draw(answer, texts));
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
  };
  const button = make("button", { className: "primary", on: { click: run } }, task.verb, " ", make("kbd", {}, "Ctrl ⏎"));
  const onKey = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  };
  place.addEventListener("keydown", onKey);
  close = () => place.removeEventListener("keydown", onKey);
  place.replaceChildren(area, make("div", { className: "actions" }, button), problem, results);
}
