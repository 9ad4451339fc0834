// The page: which mode, which model, and what the buttons and keys do.

import * as alternatives from "./alternatives.js";
import { chooseColour, showAppearance, showColourOf } from "./appearance.js";
import { Chat, isSending } from "./chat.js";
import { byId, count, eachFrame, make } from "./elements.js";
import { acceptFiles } from "./files.js";
import { Candidate, fill } from "./generation.js";
import { ModelCard } from "./model_card.js";
import { Notebook } from "./notebook.js";
import { Parameters } from "./parameters.js";
import { copyRecipe, showRecipes } from "./recipes.js";
import { askJson } from "./service.js";
import { Sessions } from "./sessions.js";
import { isOther, openTask } from "./tasks.js";
import { Undo } from "./undo.js";
import * as variants from "./variants.js";

const ENDS = { stop: "came to an end", length: "max_tokens reached", stopped: "stopped by you" };

const card = new ModelCard({ onModels: drawModels });
const undo = new Undo({ take: texts, put: showTexts, onChange: drawButtons });
const sessions = new Sessions({ take: describeSession, show: showSession, onOpen: closeDrawers, onProblem: drawProblem });
const hooks = { onEdit: changed, beforeEdit: () => undo.rememberTyping(), onToken: pointAt };
const isWide = matchMedia("(min-width: 70rem)");
const notebook = new Notebook(hooks);
const chat = new Chat({ ...hooks, onAct: actOnMessage });
let desk = notebook;
let parameters = null;
let running = null; // the AbortController of what is being generated
let lastSeed = null;
let lastRequest = null;

// ------------------------------------------------------------------ what is on the page

function texts() {
  return { mode: desk.mode, content: desk.snapshot() };
}

function showTexts(entry) {
  variants.close();
  alternatives.hide();
  if (entry.mode !== desk.mode) sessions.current.base = null;
  openMode(entry.mode);
  desk.restore(entry.content);
  changed();
}

function changed() {
  drawButtons();
  sessions.touch({ isGrowing: Boolean(running) });
}

function describeSession() {
  return {
    mode: desk.mode, title: desk.title || "Untitled", model: byId("model").value, isEmpty: notebook.isEmpty && chat.isEmpty,
    notebook: notebook.snapshot(), chat: chat.snapshot(), parameters: parameters?.state() ?? sessions.current.parameters,
  };
}

function showSession(session) {
  undo.clear();
  notebook.restore(session.notebook);
  chat.restore(session.chat);
  if (card.models.some((one) => one.model === session.model)) byId("model").value = session.model;
  openMode(session.mode ?? standardMode());
  if (card.models.length) chooseModel();
  if (session.parameters) parameters?.set(session.parameters);
  byId("state").textContent = "";
  drawProblem(null);
  drawButtons();
}

async function newSession() {
  stop();
  await sessions.new(isOther(model()) ? desk.mode : standardMode());
  if (!byId("history").hidden) await sessions.drawList();
  if (!isWide.matches) closeDrawers();
  desk.focus();
}

// ------------------------------------------------------------------ generation

function bodyOf(content) {
  const values = parameters.values();
  const known = new Set(Object.keys(schemas[desk.path].properties));
  const chosen = Object.fromEntries(Object.entries(values).filter(([name]) => known.has(name)));
  return { model: byId("model").value, ...content, ...chosen };
}

const otherModels = () => (byId("other").value ? [byId("other").value] : []);

// Streams what `content` asks for; one continuation goes in place, several side by side.
async function generate(content, { keepSeed = true } = {}) {
  const body = desk.withProbabilities(bodyOf(content), parameters.numAlternatives);
  const seed = keepSeed && body.seed !== undefined ? body.seed : Math.floor(Math.random() * 2 ** 31);
  const number = body.n ?? 1;
  const models = [body.model, ...otherModels()];
  const groups = models.map((model) => ({
    request: { path: desk.path, body: { ...body, model, seed } },
    candidates: Array.from({ length: number }, (_, index) => new Candidate(model, seed + index)),
  }));
  const all = groups.flatMap((group) => group.candidates);
  lastSeed = seed;
  lastRequest = null;
  sessions.current.base = desk.snapshot();
  start();
  byId("settings").classList.remove("open");
  if (all.length > 1) variants.open(all, { onToken: pointAtVariant, keep: keepVariant });
  const follow = isNearEnd();
  const draw = eachFrame(() => {
    if (all.length > 1) variants.draw(describe);
    else desk.show(all[0]);
    drawState(all);
    if (follow) scrollTo({ top: document.documentElement.scrollHeight });
  });
  try {
    await Promise.all(groups.map((one) => fill(one.request, one.candidates, draw, running.signal)));
  } catch (error) {
    const isStopped = error.name === "AbortError";
    for (const one of all) one.finish ??= isStopped ? "stopped" : "broken";
    running.abort(); // the other model's answer too
    if (!isStopped) drawProblem(error);
  } finally {
    draw();
    draw.now();
    end();
    drawState(all);
    if (follow) scrollTo({ top: document.documentElement.scrollHeight });
  }
  // What repeats this answer elsewhere, as long as nobody changes it here.
  lastRequest = { path: desk.path, body: { ...bodyOf(content), seed }, content: JSON.stringify(desk.snapshot()) };
  changed();
  card.read({ quietly: true }).catch(() => {}); // perhaps the model was replaced meanwhile
}

function start() {
  running = new AbortController();
  drawProblem(null);
  alternatives.hide();
  desk.lock(true);
  document.body.classList.add("running");
  byId("state").textContent = "Waiting for the first token …";
  drawButtons();
}

function end() {
  running = null;
  desk.lock(false);
  document.body.classList.remove("running");
  drawButtons();
}

const stop = () => running?.abort();

function travel(direction) {
  if (!running) undo[direction]();
}

function go() {
  if (!canStart()) return;
  undo.remember();
  variants.close();
  const content = desk.begin();
  if (content) generate(content);
}

function again() {
  if (!canStart() || !sessions.current.base) return;
  undo.remember();
  if (!variants.isOpen()) {
    const draft = chat.composer.value;
    desk.restore(sessions.current.base);
    chat.composer.value = draft;
  }
  variants.close();
  generate(desk.resume(), { keepSeed: false });
}

const canStart = () => !running && parameters && !isOther(model());

function keepVariant(candidate) {
  stop();
  undo.remember();
  desk.show(candidate);
  variants.close();
  changed();
  desk.focus();
}

function branch(view, mark, token, logprob) {
  if (running) return;
  undo.remember();
  variants.close();
  desk.branch(view, mark, token, logprob);
  changed();
  if (token && canStart()) generate(desk.resume());
}

function actOnMessage(name, node, given) {
  if (running) return;
  if (name === "turn") {
    chat.turn(node, given);
    changed();
    return;
  }
  if (!canStart()) return;
  undo.remember();
  variants.close();
  if (name === "delete") chat.remove(node);
  else if (name === "edit") edit(node, given);
  else if (name === "continue") generate(chat.request(node));
  else generate(chat.answerTo(chat.parentOf(node)), { keepSeed: false });
  changed();
}

// What is written anew stands beside what was there; another question is answered.
function edit(node, text) {
  if (!text.trim() || (text === node.text && node.role === "assistant")) return;
  const edited = text === node.text ? node : chat.add(node.role, text, chat.parentOf(node));
  if (node.role === "user") generate(chat.answerTo(edited));
}

async function measure() {
  if (!canStart() || desk !== notebook || notebook.isEmpty) return;
  undo.remember();
  start();
  byId("state").textContent = "Measuring …";
  try {
    const found = await notebook.measure(byId("model").value, parameters.numAlternatives, running.signal);
    chooseColour("probability");
    byId("state").replaceChildren(
      make("b", {}, `Perplexity ${found.perplexity.toFixed(2)}`),
      ` · ${found.bitsPerByte.toFixed(2)} bits per byte · ${count(found.numTokens, "token")}`);
  } catch (error) {
    byId("state").textContent = "";
    if (error.name !== "AbortError") drawProblem(error);
  } finally {
    end();
  }
  changed();
}

// ------------------------------------------------------------------ seeing

const controls = () => new Set(model().control_tokens);

function pointAt(view, mark, box, how) {
  if (!parameters || (running && how !== "leave")) return;
  const take = (...chosen) => branch(view, ...chosen);
  alternatives.show(mark, box, how, { take, controls: controls(), from: view.area });
}

function pointAtVariant(view, mark, box, how) {
  alternatives.show(mark, box, how, { take: null, controls: controls(), from: view.area });
}

function describe(candidate) {
  const speed = candidate.tokensPerSecond;
  const parts = [count(candidate.numTokens, "token")];
  if (speed) parts.push(`${Math.round(speed)} tokens/s`);
  if (desk !== chat) parts.push(`seed ${candidate.seed}`);
  if (candidate.finish && !(desk === chat && candidate.finish === "stop")) parts.push(ENDS[candidate.finish] ?? "broken off");
  return parts.join(" · ");
}

function drawState(all) {
  const state = byId("state");
  const first = all.length === 1 ? all[0] : null;
  const text = first ? describe(first) : `${all.length} variants`;
  const wait = first?.first && desk !== chat ? ` · first after ${Math.round(first.first - first.asked)} ms` : "";
  if (running) {
    state.textContent = text;
    return;
  }
  state.replaceChildren(text + wait, " ", make("button", { className: "quiet", id: "use-seed", on: { click: useSeed } }, "Use this seed"));
}

function useSeed() {
  parameters.put("seed", lastSeed);
  changed();
}

function drawProblem(error) {
  byId("problem").hidden = !error;
  byId("problem").textContent = error ? error.message : "";
}

const isNearEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 160;

function drawButtons() {
  const isOtherTask = parameters ? isOther(model()) : false;
  byId("bar").hidden = isOtherTask;
  byId("settings").hidden = isOtherTask;
  byId("go").hidden = Boolean(running);
  byId("go").firstChild.textContent = desk === chat ? "Send " : "Continue ";
  byId("go").lastChild.textContent = desk === chat ? "⏎" : "Ctrl ⏎";
  byId("stop").hidden = !running;
  byId("go").disabled = !parameters;
  byId("again").disabled = Boolean(running) || !sessions.current?.base;
  byId("undo").disabled = Boolean(running) || !undo.past.length;
  byId("redo").disabled = Boolean(running) || !undo.future.length;
  byId("measure").hidden = desk !== notebook;
  byId("measure").disabled = Boolean(running) || !parameters || notebook.isEmpty;
}

// ------------------------------------------------------------------ models and modes

const model = () => card.find(byId("model").value);

function drawModels(models) {
  for (const [id, first] of [["model", []], ["other", [make("option", { value: "" }, "nothing")]]]) {
    const select = byId(id);
    const chosen = select.value;
    select.replaceChildren(...first, ...models.map((one) => make("option", { value: one.model }, one.model)));
    if ([...select.options].some((one) => one.value === chosen)) select.value = chosen;
    byId(`${id}-picker`).hidden = models.length < 2;
  }
  chooseModel();
}

function chooseModel() {
  const chosen = model();
  card.show(chosen.model);
  for (const option of byId("other").options) option.disabled = option.value === chosen.model;
  if (byId("other").value === chosen.model) byId("other").value = "";
  const canChat = chosen.has_chat_template;
  byId("tab-chat").disabled = !canChat;
  byId("tab-chat").title = canChat ? "" : "This model came without a chat template";
  if (!canChat && desk === chat) openMode("notebook");
  chat.useModel(chosen);
  parameters?.useModel(chosen, { isChat: desk === chat });
  openTask(chosen);
  byId("notebook").hidden = isOther(chosen) || desk !== notebook;
  drawButtons();
}

// A model that is made to chat is met in a chat.
const standardMode = () => (card.models.length && model().has_chat_template ? "chat" : "notebook");

function openMode(mode) {
  desk = mode === "chat" ? chat : notebook;
  document.body.dataset.mode = desk.mode;
  showColourOf(desk.mode);
  byId(desk === chat ? "settings-colour" : "bar-colour").append(byId("colours"));
  chat.grow();
  if (card.models.length) parameters?.useModel(model(), { isChat: desk === chat });
  for (const name of ["notebook", "chat"]) {
    byId(name).hidden = name !== desk.mode;
    byId(`tab-${name}`).ariaSelected = String(name === desk.mode);
    byId(`tab-${name}`).tabIndex = name === desk.mode ? 0 : -1;
  }
  variants.close();
  drawButtons();
}

function switchMode(mode) {
  if (running || desk.mode === mode || byId(`tab-${mode}`).disabled) return;
  openMode(mode);
  sessions.current.base = null;
  desk.focus();
  changed();
}

function showCode() {
  const repeats = lastRequest?.path === desk.path && lastRequest.content === JSON.stringify(desk.snapshot());
  const body = repeats ? lastRequest.body : bodyOf(desk.preview());
  showRecipes({ path: desk.path, body, model: card.find(body.model), repeats });
}

// ------------------------------------------------------------------ keys

function onKey(event) {
  const isCommand = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open]")) return;
  const isDraft = event.target === chat.composer;
  if (isDraft ? isSending(event) : event.key === "Enter" && isCommand) {
    event.preventDefault();
    go();
  } else if (event.key === "Escape") {
    if (alternatives.isOpen()) alternatives.hide();
    else if (running) stop();
    else closeDrawers();
  } else if (isCommand && event.key.toLowerCase() === "z" && event.target.className === "area") {
    event.preventDefault();
    travel(event.shiftKey ? "redo" : "undo");
  }
}

function toggleSettings() {
  const isOpen = byId("settings").classList.toggle("open");
  byId("settings-button").ariaExpanded = String(isOpen);
}

function closeSettings() {
  byId("settings").classList.remove("open");
  byId("settings-button").ariaExpanded = "false";
}

async function showHistory(isShown) {
  byId("history").hidden = !isShown;
  document.body.classList.toggle("with-history", isShown);
  byId("history-button").ariaExpanded = String(isShown);
  if (isWide.matches) localStorage.setItem("fst.history", isShown ? "open" : "closed");
  if (isShown) await sessions.list();
}

// Where there is no room beside the text.
function closeDrawers() {
  closeSettings();
  if (!isWide.matches && !byId("history").hidden) showHistory(false);
}

function listen() {
  const clicks = {
    go, stop, again, measure, undo: () => travel("undo"), redo: () => travel("redo"), new: newSession, copy: copyRecipe,
    export: () => sessions.exportAll(),
    "tab-notebook": () => switchMode("notebook"), "tab-chat": () => switchMode("chat"),
    "history-button": () => showHistory(byId("history").hidden), "history-done": () => showHistory(false), "recipes-button": showCode, "settings-button": toggleSettings, "settings-done": closeSettings,
    import: () => byId("import-file").click(), "file-button": () => byId("text-file").click(),
  };
  for (const [id, handler] of Object.entries(clicks)) byId(id).addEventListener("click", () => handler());
  for (const one of document.querySelectorAll("dialog .close")) one.addEventListener("click", () => one.closest("dialog").close());
  byId("import-file").addEventListener("change", () => sessions.importFile());
  byId("model").addEventListener("change", () => {
    if (notebook.isEmpty && chat.isEmpty) openMode(standardMode());
    chooseModel();
    changed();
  });
  for (const id of ["message", "system"]) byId(id).addEventListener("input", changed);
  byId("message").addEventListener("input", () => chat.grow());
  byId("search").addEventListener("input", () => sessions.drawList());
  acceptFiles({
    input: byId("text-file"), isWanted: () => desk === chat, onText: (text) => chat.insert(text), onProblem: drawProblem,
  });
  for (const id of ["tab-notebook", "tab-chat"]) {
    byId(id).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      switchMode(desk === chat ? "notebook" : "chat");
      byId(`tab-${desk.mode}`).focus();
    });
  }
  addEventListener("keydown", onKey);
  addEventListener("pagehide", () => sessions.save());
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && parameters) card.look().catch(() => {});
  });
}

// ------------------------------------------------------------------ start

const schemas = {};

async function readSchemas() {
  const { paths } = await askJson("/openapi.json");
  for (const path of [notebook.path, chat.path]) {
    schemas[path] = paths[path].post.requestBody.content["application/json"].schema;
  }
}

async function begin() {
  showAppearance({ onColour: changed });
  listen();
  await sessions.begin();
  const wanted = sessions.current.model;
  try {
    await Promise.all([card.read(), readSchemas()]);
  } catch (error) {
    byId("card-line").textContent = "No model";
    drawProblem(error);
    return;
  }
  if (card.models.some((one) => one.model === wanted)) byId("model").value = wanted;
  if (!sessions.current.updated) openMode(standardMode());
  chooseModel();
  parameters = new Parameters(schemas[notebook.path], { model: model(), isChat: desk === chat, onChange: changed });
  if (sessions.current.parameters) parameters.set(sessions.current.parameters);
  drawButtons();
  card.watch();
  const wish = localStorage.getItem("fst.history");
  if (isWide.matches && (wish ?? (desk === chat ? "open" : "closed")) === "open") await showHistory(true);
  desk.focus();
  document.body.dataset.ready = "yes";
}

begin();
