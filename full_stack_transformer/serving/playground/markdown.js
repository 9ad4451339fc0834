// Markdown -> elements. The parser (markdown_blocks.js) only says what is where: the elements are made here, one by
// one, and texts go in as texts. So no text can become markup, whatever it holds.

import { make } from "./elements.js";
import { lexer } from "./markdown_blocks.js";

const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);
const COPIED_MILLISECONDS = 1500;

// `&lt;` -> `<`: the parser leaves entities to the browser.
function decoded(text) {
  if (!text.includes("&")) return text;
  // The letter keeps white space at the beginning.
  return new DOMParser().parseFromString(`x${text.replaceAll("<", "&lt;")}`, "text/html").body.textContent.slice(1);
}

function safeAddress(address) {
  try {
    const url = new URL(decoded(address));
    return PROTOCOLS.has(url.protocol) ? url.href : null;
  } catch {
    return null; // relative: the page has nothing to link to
  }
}

function link(token, children) {
  const href = safeAddress(token.href);
  if (!href) return make("span", { title: token.href }, ...children);
  return make("a", { href, title: token.title ?? "", target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

const INLINE = {
  strong: (token) => make("strong", {}, ...inline(token.tokens)),
  em: (token) => make("em", {}, ...inline(token.tokens)),
  del: (token) => make("del", {}, ...inline(token.tokens)),
  codespan: (token) => make("code", {}, token.text),
  br: () => make("br"),
  link: (token) => link(token, inline(token.tokens)),
  // Nothing is loaded from elsewhere: a picture is a link to it.
  image: (token) => link(token, [token.text || token.href]),
  escape: (token) => token.text,
  text: (token) => decoded(token.text),
};

const inline = (tokens) => tokens.map((token) => INLINE[token.type](token));

function cells(tag, row) {
  return make("tr", {}, ...row.map((cell) =>
    make(tag, { className: cell.align ? `to-${cell.align}` : "" }, ...inline(cell.tokens))));
}

export async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here"; // only pages with TLS and those of this machine may
  }
  setTimeout(() => { button.textContent = label; }, COPIED_MILLISECONDS);
}

function code(token) {
  const button = make("button", { className: "quiet", type: "button" }, "Copy");
  button.addEventListener("click", () => copyText(token.text, button));
  return make("figure", { className: "code" },
    make("figcaption", {}, make("span", {}, (token.lang ?? "").split(/\s/)[0] || "text"), button),
    make("pre", { tabIndex: 0 }, make("code", {}, token.text)));
}

function list(token) {
  const items = token.items.map((item) => make("li", { className: item.task ? "task-item" : "" },
    ...(item.task ? [item.checked ? "☑ " : "☐ "] : []), ...blocks(item.tokens)));
  return token.ordered ? make("ol", { start: Number(token.start) || 1 }, ...items) : make("ul", {}, ...items);
}

const BLOCK = {
  space: () => "",
  text: (token) => make("span", {}, ...inline(token.tokens)),
  hr: () => make("hr"),
  code,
  list,
  heading: (token) => make(`h${Math.min(6, token.depth + 1)}`, {}, ...inline(token.tokens)),
  paragraph: (token) => make("p", {}, ...inline(token.tokens)),
  blockquote: (token) => make("blockquote", {}, ...blocks(token.tokens)),
  table: (token) => make("div", { className: "wide" }, make("table", {},
    make("thead", {}, cells("th", token.header)), make("tbody", {}, ...token.rows.map((row) => cells("td", row))))),
};

const blocks = (tokens) => tokens.map((token) => BLOCK[token.type](token));

// A text that may grow: only the blocks that have changed are made anew, so a selection in the others stays.
export class Prose {
  constructor() {
    this.element = make("div", { className: "prose" });
    this.shown = []; // [{raw, nodes}]
    this.links = "{}";
  }

  set(text) {
    const tokens = lexer(text);
    const links = JSON.stringify(tokens.links);
    let same = 0;
    if (links === this.links) {
      while (same < this.shown.length && this.shown[same].raw === tokens[same]?.raw) same += 1;
    }
    for (const { node } of this.shown.splice(same)) node.remove();
    for (const token of tokens.slice(same)) {
      const [made] = blocks([token]);
      const node = typeof made === "string" ? document.createTextNode(made) : made;
      this.element.append(node);
      this.shown.push({ raw: token.raw, node });
    }
    this.links = links;
  }
}
