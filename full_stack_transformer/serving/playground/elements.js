// Small helpers for the document. Text goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

// An element with properties, `on` handlers, `data` and `attributes`, and children (elements or texts).
export function make(tag, { on = {}, data = {}, attributes = {}, ...properties } = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const [name, handler] of Object.entries(on)) element.addEventListener(name, handler);
  element.append(...children);
  return element;
}

export const count = (number, one, many = `${one}s`) =>
  `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

export const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : value >= 0.095 ? `${value.toFixed(1)} %` : "< 0.1 %";
};

// White space that can be seen.
export const visible = (text) =>
  text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");

// At most once per frame, with the latest call's arguments.
export function eachFrame(work) {
  let latest = null;
  const run = () => {
    const wanted = latest;
    latest = null;
    if (wanted) work(...wanted);
  };
  const asked = (...given) => {
    if (!latest) requestAnimationFrame(run);
    latest = given;
  };
  asked.now = run;
  return asked;
}
