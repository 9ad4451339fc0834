// The same request from a shell, from Python, and without the service: their texts, and the dialog with them.

import { byId, make } from "./elements.js";

const OPENAI = new Set(["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed",
  "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format", "echo", "best_of"]);
const COMMAND = {
  max_tokens: "max_new_tokens", min_tokens: "min_new_tokens", n: "num_return_sequences", temperature: "temperature",
  top_p: "top_p", top_k: "top_k", min_p: "min_p", typical_p: "typical_p", repetition_penalty: "repetition_penalty",
  presence_penalty: "presence_penalty", frequency_penalty: "frequency_penalty", seed: "seed",
};
const REPEATED = { stop: "stop", ignored_words: "ignored_words" };

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function python(value, indent = "") {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) {
    if (value.every((one) => typeof one !== "object")) return `[${value.map((one) => python(one)).join(", ")}]`;
    return `[\n${value.map((one) => `${indent}    ${python(one, `${indent}    `)},\n`).join("")}${indent}]`;
  }
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${python(name)}: ${python(one, indent)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

function curl(path, body, hasKey) {
  const key = hasKey ? ' -H "Authorization: Bearer $FST_API_KEY"' : "";
  return `curl ${location.origin}${path}${key} -d ${quoted(JSON.stringify(body))}`;
}

function client(path, body, hasKey) {
  const isChat = path.includes("chat");
  const [own, extra] = [[], {}];
  for (const [name, value] of Object.entries(body)) {
    if (OPENAI.has(name)) own.push(`    ${name}=${python(value, "    ")},\n`);
    else extra[name] = value;
  }
  if (Object.keys(extra).length) own.push(`    extra_body=${python(extra)},\n`);
  const key = hasKey ? 'os.environ["FST_API_KEY"]' : '"none"';
  return `${hasKey ? "import os\n\n" : ""}import openai

client = openai.OpenAI(base_url="${location.origin}/v1", api_key=${key})
answer = client.${isChat ? "chat.completions" : "completions"}.create(
${own.join("")})
for choice in answer.choices:
    print(choice.${isChat ? "message.content" : "text"})`;
}

// One question is a command; a longer chat is talked.
function command(body, path, model) {
  const messages = body.messages ?? [];
  const system = messages[0]?.role === "system" ? ["--system", quoted(messages[0].content)] : [];
  const asked = messages.filter((one) => one.role !== "system");
  const isOne = asked.length === 1 && asked[0].role === "user";
  if (body.messages && !isOne) return ["fst chat", quoted(path), ...system].join(" ");
  const words = ["fst generate", quoted(path), ...system, "--prompt", quoted(isOne ? asked[0].content : body.prompt)];
  if (!isOne && model.has_chat_template) words.push("--raw");
  for (const [name, option] of Object.entries(COMMAND)) {
    const value = body[name];
    if (value !== undefined) words.push(`--${option}`, String(value));
  }
  for (const [name, option] of Object.entries(REPEATED)) {
    for (const one of body[name] ?? []) words.push(`--${option}`, quoted(one));
  }
  for (const [id, value] of Object.entries(body.logit_bias ?? {})) words.push("--logit_bias", `${id}=${value}`);
  return words.join(" ");
}

// By the names of their tabs: {text, note}.
function recipesOf(path, body, model, hasKey) {
  const directory = model.description.experiment ?? model.checkpoint;
  const key = hasKey ? "The key is read from FST_API_KEY. " : "";
  return {
    curl: { text: curl(path, body, hasKey), note: key },
    Python: { text: client(path, body, hasKey), note: `${key}pip install openai` },
    "fst generate": {
      text: command(body, directory, model),
      note: `Without the service; write where ${directory} lies on your machine.`,
    },
  };
}

export function showRecipes({ path, body, model, repeats }) {
  const all = recipesOf(path, body, model, sessionStorage.getItem("fst.key") !== null);
  const choose = (name) => {
    byId("recipe").textContent = all[name].text;
    byId("recipe-note").textContent = `${repeats ? "Repeats the last answer. " : ""}${all[name].note}`;
    for (const tab of byId("recipe-tabs").children) tab.ariaSelected = String(tab.textContent === name);
  };
  byId("recipe-tabs").replaceChildren(...Object.keys(all).map((name) =>
    make("button", { attributes: { role: "tab" }, on: { click: () => choose(name) } }, name)));
  choose("curl");
  byId("copy").textContent = "Copy";
  byId("recipes").showModal();
}

export async function copyRecipe() {
  const text = byId("recipe").textContent;
  try {
    await navigator.clipboard.writeText(text);
    byId("copy").textContent = "Copied";
  } catch {
    // Only pages with TLS and those of this machine may write the clipboard.
    getSelection().selectAllChildren(byId("recipe"));
    byId("copy").textContent = "Press Ctrl C";
  }
}
