// Continuations as they arrive: text, tokens with their probabilities, and marks that place both.
//
// A mark is {start, end, token, logprob, top, made}: a range of a text in UTF-16 units, the token that
// wrote it, its log-probability, the alternatives [[text, logprob], …] from the most likely down, and
// whether the model wrote it. A mark without `logprob` only says who wrote the range.

import { events } from "./service.js";

// The service counts characters, JavaScript UTF-16 units.
function unitsOf(text) {
  if (!/[\ud800-\udfff]/.test(text)) return (offset) => Math.min(offset, text.length);
  const places = [0];
  for (const character of text) places.push(places.at(-1) + character.length);
  return (offset) => places[Math.min(offset, places.length - 1)];
}

// Marks of `text` from the tokens' offsets in it; a token that only begins a character joins the next.
export function marksOf(text, tokens, { base = 0, made = true } = {}) {
  const unit = unitsOf(text);
  const marks = [];
  let begun = null;
  tokens.forEach((token, index) => {
    const start = unit(token.offset);
    const end = index + 1 < tokens.length ? unit(tokens[index + 1].offset) : text.length;
    const logprob = (begun?.logprob ?? 0) + (token.logprob ?? 0);
    const top = begun?.top ?? token.top;
    if (end <= start) {
      if (token.token.startsWith("bytes:")) begun = { logprob, top };
      return;
    }
    begun = null;
    const mark = { start: base + start, end: base + end, token: text.slice(start, end), made };
    if (token.logprob !== null) Object.assign(mark, { logprob, top });
    marks.push(mark);
  });
  return marks;
}

const sorted = (pairs) => pairs.sort((one, other) => other[1] - one[1]);

export function tokensOfCompletion(logprobs) {
  return (logprobs?.tokens ?? []).map((token, index) => ({
    token,
    logprob: logprobs.token_logprobs[index],
    top: sorted(Object.entries(logprobs.top_logprobs[index] ?? {})),
    offset: logprobs.text_offset[index],
  }));
}

export class Candidate {
  constructor(model, seed) {
    this.model = model;
    this.seed = seed;
    this.text = "";
    this.finish = null;
    this.numTokens = 0;
    this.used = null;
    this.asked = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = [];
    this.decoder = new TextDecoder();
    this.decoded = "";
  }

  take(choice) {
    this.last = performance.now();
    this.first ??= this.last;
    this.text += choice.text ?? choice.delta?.content ?? "";
    this.finish = choice.finish_reason ?? this.finish;
    const added = choice.logprobs?.content
      ? choice.logprobs.content.map((entry) => this.tokenOfChat(entry))
      : tokensOfCompletion(choice.logprobs);
    this.tokens.push(...added);
    this.numTokens += added.length || (choice.text || choice.delta?.content ? 1 : 0);
  }

  // Of the whole text, with what was asked.
  count(usage) {
    this.used = usage.total_tokens;
    this.numTokens = usage.completion_tokens;
  }

  // Chats name bytes instead of offsets.
  tokenOfChat(entry) {
    const offset = [...this.decoded].length;
    this.decoded += this.decoder.decode(new Uint8Array(entry.bytes ?? []), { stream: true });
    const top = sorted(entry.top_logprobs.map((one) => [one.token, one.logprob]));
    return { token: entry.token, logprob: entry.logprob, top, offset };
  }

  marks(base) {
    // Where white space before the answer was taken off, the tokens begin before the text.
    const lead = this.decoded && !this.text.startsWith(this.decoded.slice(0, 1))
      ? this.decoded.length - this.decoded.trimStart().length
      : 0;
    const shifted = this.tokens.map((one) => ({ ...one, offset: Math.max(0, one.offset - lead) }));
    return marksOf(this.text, shifted, { base });
  }

  get tokensPerSecond() {
    const seconds = (this.last - this.first) / 1000;
    return this.numTokens > 1 && seconds > 0 ? (this.numTokens - 1) / seconds : null;
  }
}

// Streams one request into its candidates, one for each choice.
export async function fill(request, candidates, onChange, signal) {
  for (const one of candidates) one.asked = performance.now();
  for await (const event of events(request.path, { ...request.body, stream: true }, signal)) {
    for (const choice of event.choices) candidates[choice.index].take(choice);
    if (event.usage && candidates.length === 1) candidates[0].count(event.usage);
    onChange();
  }
}
