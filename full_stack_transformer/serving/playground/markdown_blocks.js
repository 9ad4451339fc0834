// Markdown -> blocks: CommonMark with GitHub's tables, task lists and strikethrough. HTML is text.
//
//   space, hr
//   paragraph, heading {depth}, text    {tokens}    text: a paragraph of a tight list
//   code        {text, lang}
//   blockquote  {tokens}                            blocks
//   list        {ordered, start, items: [{task, checked, tokens}]}
//   table       {header, rows}                      cells {align, tokens}
//
// Each has `raw`, the lines it is made of: as long as those stay the same, so does the block. Whatever has no end
// yet, such as a fence, ends with the text, so that a text can be read while it grows. Lines are read once for each
// level of nesting, of which there are a few at most.

import { inlineTokens, labelOf, unescaped } from "./markdown_inline.js";

const MAX_DEPTH = 16;
// A header of thousands of columns must not make millions of cells.
const MAX_FILLED = 10_000;
const FENCE = /^( {0,3})(`{3,}|~{3,})([^]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+([^]*))?$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^( {0,3})([*+-]|\d{1,9}[.)])(?=[ \t]|$)/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const TASK = /^\[([ xX])\][ \t]/;
const DEFINITION = /^ {0,3}\[((?:[^[\]\\]|\\.){1,999})\]:[ \t]*(?:<([^<>]*)>|([^\s<]\S*))(?:[ \t]+(?:"([^"]*)"|'([^']*)'|\(([^()]*)\)))?[ \t]*$/;
const ALIGNMENT = /^(:?)-+(:?)$/;

const isBlank = (line) => !line.trim();
// A tab is as wide as up to the next fourth column.
const widthAt = (line, place, column) => (line[place] === "\t" ? 4 - (column % 4) : 1);

// Columns of white space before a text.
function indentOf(line) {
  let width = 0;
  for (let place = 0; line[place] === " " || line[place] === "\t"; place += 1) width += widthAt(line, place, width);
  return width;
}

function isRule(line) {
  if (indentOf(line) > 3) return false;
  const marks = line.replace(/[ \t]/g, "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function fenceOf(line) {
  const found = FENCE.exec(line);
  return found && !(found[2][0] === "`" && found[3].includes("`")) ? found : null;
}

// A line without so many columns of white space, or all of it.
function unindented(line, columns) {
  let width = 0, place = 0;
  for (; width < columns && (line[place] === " " || line[place] === "\t"); place += 1) width += widthAt(line, place, width);
  return " ".repeat(Math.max(0, width - columns)) + line.slice(place);
}

// Whether a line ends a paragraph before it.
function interrupts(line) {
  if (indentOf(line) > 3) return false;
  if (fenceOf(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line)) return true;
  const item = ITEM.exec(line);
  return Boolean(item) && !isBlank(line.slice(item[0].length)) && !(/\d/.test(item[2]) && parseInt(item[2], 10) !== 1);
}

function cellsOf(line) {
  let text = line.trim();
  if (text.startsWith("|")) text = text.slice(1);
  const cells = [];
  let cell = "";
  for (let place = 0; place < text.length; place += 1) {
    if (text[place] === "\\" && place + 1 < text.length) {
      cell += text[place + 1] === "|" ? "|" : `\\${text[place + 1]}`;
      place += 1;
    } else if (text[place] === "|") {
      cells.push(cell.trim());
      cell = "";
    } else cell += text[place];
  }
  if (cell.trim() || !text.endsWith("|")) cells.push(cell.trim());
  return cells;
}

function alignmentsOf(line) {
  if (!line?.includes("-") || /[^-:| \t]/.test(line)) return null;
  const found = cellsOf(line).map((cell) => ALIGNMENT.exec(cell));
  if (!found.every(Boolean)) return null;
  return found.map(([, left, right]) => (left && right ? "center" : right ? "right" : left ? "left" : null));
}

// The alignments of the table that begins at a line, or null.
function tableAt(lines, index) {
  const next = lines[index + 1];
  if (!lines[index].includes("|") || !next?.includes("-") || indentOf(next) > 3) return null;
  const alignments = alignmentsOf(next);
  return alignments && cellsOf(lines[index]).length === alignments.length ? alignments : null;
}

class Reader {
  constructor() {
    this.links = new Map();
    this.numFilled = 0; // cells that no row wrote
    this.texts = []; // tokens that get their inline tokens when all links are known
  }

  // Tokens of lines; each is read by the first method that knows it.
  blocks(lines, depth = 0) {
    const tokens = [];
    let index = 0;
    while (index < lines.length) {
      const [token, end] = this.block(lines, index, depth);
      tokens.push(Object.assign(token, { raw: lines.slice(index, end).join("\n") }));
      index = end;
    }
    return tokens;
  }

  block(lines, index, depth) {
    const line = lines[index];
    if (isBlank(line)) {
      let end = index + 1;
      while (end < lines.length && isBlank(lines[end])) end += 1;
      return [{ type: "space" }, end];
    }
    if (indentOf(line) > 3) return this.indentedCode(lines, index);
    const fence = fenceOf(line);
    if (fence) return this.fencedCode(lines, index, fence);
    const heading = HEADING.exec(line);
    if (heading) {
      const text = (heading[2] ?? "").replace(/(^|[ \t])#+[ \t]*$/, "");
      return [this.withText({ type: "heading", depth: heading[1].length }, text), index + 1];
    }
    if (isRule(line)) return [{ type: "hr" }, index + 1];
    if (depth < MAX_DEPTH) {
      if (QUOTE.test(line)) return this.quote(lines, index, depth);
      if (ITEM.test(line)) return this.list(lines, index, depth);
    }
    const alignments = tableAt(lines, index);
    if (alignments) return this.table(lines, index, alignments);
    const definition = DEFINITION.exec(line);
    if (definition) {
      const [, label, angled, plain, ...titles] = definition;
      const title = titles.find((one) => one !== undefined);
      const link = { href: unescaped(angled ?? plain), title: title && unescaped(title) };
      if (!this.links.has(labelOf(label))) this.links.set(labelOf(label), link);
      return [{ type: "space" }, index + 1];
    }
    return this.paragraph(lines, index);
  }

  withText(token, text) {
    this.texts.push([token, text]);
    token.tokens = [];
    return token;
  }

  indentedCode(lines, index) {
    let end = index;
    for (let next = index; next < lines.length && (isBlank(lines[next]) || indentOf(lines[next]) > 3); next += 1) {
      if (!isBlank(lines[next])) end = next + 1;
    }
    return [{ type: "code", lang: "", text: lines.slice(index, end).map((line) => unindented(line, 4)).join("\n") }, end];
  }

  fencedCode(lines, index, [, indent, fence, words]) {
    let end = index + 1;
    const isEnd = (line) => {
      const text = line.trim();
      return indentOf(line) <= 3 && text.length >= fence.length && text === fence[0].repeat(text.length);
    };
    while (end < lines.length && !isEnd(lines[end])) end += 1;
    const inner = lines.slice(index + 1, end).map((line) => unindented(line, indent.length));
    return [{ type: "code", lang: unescaped(words.trim()), text: inner.join("\n") }, Math.min(end + 1, lines.length)];
  }

  quote(lines, index, depth) {
    const inner = [];
    let end = index;
    let mayGoOn = false; // a paragraph, whose next line needs no mark
    for (; end < lines.length; end += 1) {
      const line = lines[end];
      const isMarked = QUOTE.test(line);
      if (!isMarked && (isBlank(line) || !mayGoOn || interrupts(line))) break;
      inner.push(isMarked ? line.replace(/^ {0,3}> ?/, "") : line);
      const last = inner[inner.length - 1].replace(/^[ >]*/, "");
      if (isMarked) mayGoOn = !isBlank(last) && !fenceOf(last) && !HEADING.test(last) && !isRule(last);
    }
    return [{ type: "blockquote", tokens: this.blocks(inner, depth + 1) }, end];
  }

  list(lines, index, depth) {
    const first = ITEM.exec(lines[index])[2];
    const kind = first[first.length - 1]; // a bullet, or what stands behind a number
    const items = [];
    let end = index, isLoose = false;
    while (end < lines.length) {
      const marker = ITEM.exec(lines[end]);
      if (!marker || isRule(lines[end]) || marker[2][marker[2].length - 1] !== kind) break;
      const [inner, next] = this.itemLines(lines, end, marker);
      let last = next;
      while (last > end + 1 && isBlank(lines[last - 1])) last -= 1;
      const item = { task: false, checked: false };
      const task = TASK.exec(inner[0]);
      if (task) {
        Object.assign(item, { task: true, checked: task[1] !== " " });
        inner[0] = inner[0].slice(task[0].length);
      }
      item.tokens = this.blocks(inner.slice(0, Math.max(1, inner.length - (next - last))), depth + 1);
      isLoose ||= item.tokens.slice(1, -1).some((token) => token.type === "space");
      items.push(item);
      end = next;
      const goesOn = end < lines.length && ITEM.exec(lines[end]);
      if (last < next && goesOn && goesOn[2][goesOn[2].length - 1] === kind) isLoose = true;
      else if (!goesOn) end = last;
    }
    while (end > index + 1 && isBlank(lines[end - 1])) end -= 1;
    if (!isLoose) {
      for (const item of items) {
        for (const token of item.tokens) if (token.type === "paragraph") token.type = "text";
      }
    }
    const ordered = /\d/.test(first);
    return [{ type: "list", ordered, start: ordered ? parseInt(first, 10) : "", items }, end];
  }

  // The lines of an item without their indentation, and where it ends; with the blank lines behind it.
  itemLines(lines, index, marker) {
    const rest = lines[index].slice(marker[0].length);
    const space = indentOf(rest);
    const width = isBlank(rest) || space > 4 ? 1 : space;
    const indent = marker[0].length + width;
    const inner = [unindented(rest, width)];
    let fence = fenceOf(inner[0])?.[2];
    let end = index + 1;
    for (; end < lines.length; end += 1) {
      const line = lines[end];
      if (isBlank(line)) {
        if (end === index + 1 && isBlank(inner[0])) return [inner, end]; // an item without a text
        inner.push("");
        continue;
      }
      const belongs = indentOf(line) >= indent;
      if (!belongs) {
        const isAfterBlank = isBlank(lines[end - 1]);
        if (isAfterBlank || fence || ITEM.test(line) || interrupts(line) || isBlank(inner[0])) break;
      }
      inner.push(belongs ? unindented(line, indent) : line.trimStart());
      const found = fenceOf(inner[inner.length - 1])?.[2];
      if (found && !fence) fence = found;
      else if (found && found[0] === fence[0] && found.length >= fence.length) fence = undefined;
    }
    return [inner, end];
  }

  table(lines, index, alignments) {
    const row = (line) => {
      const cells = cellsOf(line).slice(0, alignments.length);
      this.numFilled += alignments.length - cells.length;
      if (this.numFilled < MAX_FILLED) cells.push(...Array(alignments.length - cells.length).fill(""));
      return cells.map((cell, place) => this.withText({ align: alignments[place] }, cell));
    };
    const header = row(lines[index]);
    const rows = [];
    let end = index + 2;
    for (; end < lines.length && !isBlank(lines[end]) && !interrupts(lines[end]); end += 1) rows.push(row(lines[end]));
    return [{ type: "table", header, rows }, end];
  }

  paragraph(lines, index) {
    let end = index + 1;
    for (; end < lines.length && !isBlank(lines[end]); end += 1) {
      const underline = UNDERLINE.exec(lines[end]);
      if (underline) {
        const text = lines.slice(index, end).join("\n");
        return [this.withText({ type: "heading", depth: underline[1][0] === "=" ? 1 : 2 }, text), end + 1];
      }
      if (interrupts(lines[end]) || tableAt(lines, end)) break;
    }
    return [this.withText({ type: "paragraph" }, lines.slice(index, end).join("\n")), end];
  }
}

// Blocks of a text, with `links`: label -> {href, title}.
export function lexer(text) {
  const reader = new Reader();
  const tokens = reader.blocks(text.replace(/\r\n?/g, "\n").split("\n"));
  for (const [token, content] of reader.texts) token.tokens = inlineTokens(content, reader.links);
  tokens.links = Object.fromEntries(reader.links);
  return tokens;
}
