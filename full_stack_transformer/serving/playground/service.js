// Requests to the service that this page came from: the key, errors, and streams of events.

import { byId } from "./elements.js";

const KEY = "fst.key";

export class ServiceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let asking = null;

// Asks for a key once, however many requests want one.
function askForKey(isWrong) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key");
    byId("key-problem").hidden = !isWrong;
    const onSubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, byId("key-value").value.trim());
      byId("key-value").value = "";
      dialog.close("given");
    };
    byId("key-form").addEventListener("submit", onSubmit);
    dialog.addEventListener(
      "close",
      () => {
        byId("key-form").removeEventListener("submit", onSubmit);
        asking = null;
        if (dialog.returnValue === "given") resolve();
        else reject(new ServiceError("This service wants a key.", 401));
        dialog.returnValue = "";
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

async function problemOf(response) {
  let message = `The service answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // No JSON: a proxy answered.
  }
  const seconds = response.headers.get("retry-after");
  if (response.status === 429 && seconds) message += ` Try again in ${seconds} s.`;
  return new ServiceError(message, response.status);
}

// The response of a route; asks for a key where one is wanted, unless `quietly`.
export async function ask(path, { body, signal, quietly = false } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const options = body === undefined ? { headers, signal } : {
      method: "POST",
      headers: { ...headers, "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    };
    let response;
    try {
      response = await fetch(path, { ...options, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError("The service cannot be reached.");
    }
    if (response.ok) return response;
    if (response.status !== 401 || quietly) throw await problemOf(response);
    // Another request may have been given a key meanwhile.
    if (sessionStorage.getItem(KEY) === key) await askForKey(key !== null);
  }
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// The events of a stream, until `[DONE]`.
export async function* events(path, body, signal) {
  const response = await ask(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServiceError("The service ended the answer too early.");
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice(6);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServiceError(event.error.message);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ServiceError("The connection to the service broke.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
