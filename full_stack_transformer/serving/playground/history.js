// Sessions, kept in this browser's database; in memory where it has none.

const NAME = "fst.playground";
const STORE = "sessions";
const FORMAT = "fst.playground/1";

const promised = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

class Memory {
  constructor() {
    this.sessions = new Map();
  }

  async all() {
    return [...this.sessions.values()];
  }

  async put(session) {
    this.sessions.set(session.id, session);
  }

  async remove(id) {
    this.sessions.delete(id);
  }
}

class Database {
  constructor(database) {
    this.database = database;
  }

  store(mode) {
    return this.database.transaction(STORE, mode, { durability: "relaxed" }).objectStore(STORE);
  }

  all() {
    return promised(this.store("readonly").getAll());
  }

  put(session) {
    return promised(this.store("readwrite").put(session));
  }

  remove(id) {
    return promised(this.store("readwrite").delete(id));
  }
}

export async function openHistory() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    return new Database(await promised(request));
  } catch {
    return new Memory();
  }
}

export const exported = (sessions) => JSON.stringify({ format: FORMAT, sessions }, null, 1);

const isMark = (one) => Number.isInteger(one?.start) && Number.isInteger(one.end) && one.start < one.end;

// A part of a file that was not written here may be anything.
function checkedText({ text, marks }) {
  if (typeof text !== "string") throw new Error("a text is missing");
  const ends = [];
  for (const one of Array.isArray(marks) ? marks : []) {
    if (!isMark(one) || one.end > text.length || one.start < (ends.at(-1) ?? 0)) return { text, marks: [] };
    ends.push(one.end);
  }
  const top = (one) => (Array.isArray(one.top) ? one.top : [])
    .filter((pair) => typeof pair?.[0] === "string" && typeof pair[1] === "number").map(([token, value]) => [token, value]);
  const kept = (marks ?? []).map((one) => ({
    start: one.start, end: one.end, made: one.made === true, token: text.slice(one.start, one.end),
    ...(typeof one.logprob === "number" ? { logprob: one.logprob, top: top(one) } : {}),
  }));
  return { text, marks: kept };
}

function checkedRole({ role }, known) {
  if (!known.includes(role)) throw new Error("a role is unknown");
  return role;
}

// A tree: each node comes after the one that it answers. Files of before have a list of messages.
function checkedChat({ nodes, messages, leaf, system, draft }) {
  const rest = { system: String(system ?? ""), draft: String(draft ?? "") };
  if (messages) {
    return { ...rest, messages: messages.map((one) => ({ role: checkedRole(one, ["system", "user", "assistant"]), ...checkedText(one) })) };
  }
  const known = new Set([null]);
  const checked = nodes.map((one) => {
    if (!Number.isInteger(one.id) || known.has(one.id) || !known.has(one.parent)) throw new Error("a branch begins nowhere");
    known.add(one.id);
    return {
      id: one.id, parent: one.parent, role: checkedRole(one, ["user", "assistant"]), ...checkedText(one),
      ...(Number.isInteger(one.used) ? { used: one.used } : {}), isCut: one.isCut === true,
    };
  });
  return { ...rest, nodes: checked, leaf: known.has(leaf) ? leaf : null };
}

function checkedSession(session) {
  const { id, mode, updated, model, parameters } = session;
  if (typeof id !== "string" || !["notebook", "chat"].includes(mode)) throw new Error("no session");
  const notebook = session.notebook ? checkedText(session.notebook) : undefined;
  const chat = session.chat && checkedChat(session.chat);
  return {
    id, mode, notebook, chat, title: String(session.title ?? ""), updated: Number(updated) || 0,
    model: typeof model === "string" ? model : undefined,
    parameters: parameters && typeof parameters === "object" ? parameters : {},
  };
}

// The sessions of an exported file.
export function imported(text) {
  const { format, sessions } = JSON.parse(text);
  if (format !== FORMAT) throw new Error(`expected the format ${FORMAT}`);
  return sessions.map(checkedSession);
}
