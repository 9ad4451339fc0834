// A line of Markdown -> tokens: CommonMark's emphasis and links, GitHub's strikethrough and bare addresses.
//
//   text      {text}              entities are still to be decoded
//   escape    {text}              a character as it is
//   codespan  {text}
//   br
//   strong, em, del   {tokens}
//   link, image       {href, title, text, tokens}
//
// Each character is looked at a bounded number of times, whatever the text is: no expression here can backtrack,
// what a link may hold is bounded, and delimiters that found no partner are not asked again.

const MAX_DEPTH = 40;
const MAX_LABEL = 999;
const PLAIN = "http:"; // of an address that begins with www
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const TARGET = /\([ \t\n]{0,9}(?:<([^<>\n]{0,2000})>|([^\s<()]{0,2000}(?:\([^\s()]{0,500}\)[^\s()]{0,500}){0,4}))(?:[ \t\n]{1,9}(?:"([^"]{0,500})"|'([^']{0,500})'|\(([^()]{0,500})\)))?[ \t\n]{0,9}\)/y;
const ADDRESS = /<(?:([a-z][a-z0-9+.-]{1,31}:[^\s<>]{0,2000})|([\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}))>/iy;
const BARE = /(?:https?:\/\/|www\.)[^\s<]{1,2000}/iy;
const BREAK = /<br[ ]{0,3}\/?>/iy;
const REFERENCE = /\[((?:[^[\]\\]|\\.){0,999})\]/y;

const at = (expression, text, place) => {
  expression.lastIndex = place;
  return expression.exec(text);
};

export const unescaped = (text) => text.replace(/\\([!-/:-@[-`{-~])/g, "$1");
export const labelOf = (text) => text.trim().replace(/\s+/g, " ").toLowerCase();

// A list of nodes whose middle can be put into another node at once.
class Nodes {
  constructor() {
    this.first = this.last = null;
  }

  add(node) {
    node.before = this.last;
    node.after = null;
    if (this.last) this.last.after = node; else this.first = node;
    this.last = node;
    return node;
  }

  // Puts what stands between two nodes, up to the end without the second, into `node`, which takes its place.
  wrap(opener, closer, node) {
    const inner = new Nodes();
    inner.first = opener.after === closer ? null : opener.after;
    inner.last = inner.first && (closer ? closer.before : this.last);
    if (inner.first) inner.first.before = inner.last.after = null;
    node.inner = inner;
    node.before = opener;
    node.after = closer;
    opener.after = node;
    if (closer) closer.before = node; else this.last = node;
  }

  remove(node) {
    if (node.before) node.before.after = node.after; else this.first = node.after;
    if (node.after) node.after.before = node.before; else this.last = node.before;
  }
}

// Where each run of backquotes begins, by its length, so that the end of a code is found without a search.
function backquotes(text) {
  const found = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!found.has(run.length)) found.set(run.length, { places: [], next: 0 });
    found.get(run.length).places.push(index);
  }
  return found;
}

class Line {
  constructor(text, links) {
    this.text = text;
    this.links = links;
    this.nodes = new Nodes();
    this.delimiters = []; // runs of * _ ~ that may open or close
    this.brackets = []; // [ and ![ that may begin a link
    this.numInside = 0; // so many of them are left of a link, which none may contain
    this.backquotes = backquotes(text);
    this.numLooks = 1000 + 8 * text.length; // at nodes; only hostile texts need more
  }

  tokens() {
    const { text } = this;
    let place = 0;
    while (place < text.length) place = this.read(place);
    this.emphasize(0);
    return tokensOf(this.nodes, false);
  }

  say(text, type = "text") {
    const { last } = this.nodes;
    if (type === "text" && last?.type === "text" && !last.isMark) last.text += text;
    else this.nodes.add({ type, text });
  }

  // Reads what begins at a place; returns where it ends.
  read(place) {
    const { text } = this;
    const letter = text[place];
    switch (letter) {
      case "\\": return this.escape(place);
      case "`": return this.code(place);
      case "*": case "_": case "~": return this.delimiter(place, letter);
      case "!":
        if (text[place + 1] === "[") return this.bracket(place, "![");
        break;
      case "[": return this.bracket(place, "[");
      case "]": return this.close(place);
      case "<": return this.address(place);
      case "\n": return this.newLine(place);
      case "h": case "H": case "w": case "W": {
        const end = this.bare(place);
        if (end) return end;
      }
    }
    this.say(letter);
    return place + 1;
  }

  // How deep a node around those between two would be.
  depthBetween(opener, closer) {
    let depth = 0;
    for (let node = opener.after; node && node !== closer; node = node.after) {
      depth = Math.max(depth, node.depth ?? 0);
      this.numLooks -= 1;
      if (this.numLooks < 0) return Infinity;
    }
    return depth + 1;
  }

  escape(place) {
    const next = this.text[place + 1];
    if (next === "\n") return this.newLine(place + 1);
    if (!next || !ESCAPABLE.test(next)) this.say("\\");
    else {
      this.say(next, "escape");
      return place + 2;
    }
    return place + 1;
  }

  newLine(place) {
    const { last } = this.nodes;
    if (last?.type === "text" && !last.isMark) last.text = last.text.trimEnd();
    this.nodes.add({ type: "br" });
    let end = place + 1;
    while (this.text[end] === " " || this.text[end] === "\t") end += 1;
    return end;
  }

  code(place) {
    let end = place;
    while (this.text[end] === "`") end += 1;
    const runs = this.backquotes.get(end - place);
    while (runs.next < runs.places.length && runs.places[runs.next] < end) runs.next += 1;
    const stop = runs.places[runs.next];
    if (stop === undefined) {
      this.say(this.text.slice(place, end));
      return end;
    }
    let inner = this.text.slice(end, stop).replaceAll("\n", " ");
    if (/^ .* $/.test(inner) && inner.trim()) inner = inner.slice(1, -1);
    this.say(inner, "codespan");
    return stop + end - place;
  }

  delimiter(place, letter) {
    const { text } = this;
    let end = place;
    while (text[end] === letter) end += 1;
    const before = text[place - 1] ?? "\n", after = text[end] ?? "\n";
    const [blankBefore, blankAfter] = [/\s/.test(before), /\s/.test(after)];
    const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    const opens = !blankAfter && (!markAfter || blankBefore || markBefore);
    const closes = !blankBefore && (!markBefore || blankAfter || markAfter);
    const isWord = letter === "_";
    const node = this.nodes.add({ type: "text", text: text.slice(place, end), isMark: true });
    if (letter !== "~" || end - place <= 2) {
      this.delimiters.push({
        node, letter, left: end - place, length: end - place,
        opens: opens && (!isWord || !closes || markBefore),
        closes: closes && (!isWord || !opens || markAfter),
      });
    }
    return end;
  }

  bracket(place, mark) {
    const node = this.nodes.add({ type: "text", text: mark, isMark: true });
    this.brackets.push({ node, place: place + mark.length, isImage: mark === "![", numDelimiters: this.delimiters.length });
    return place + mark.length;
  }

  close(place) {
    const opener = this.brackets.pop();
    const isInside = opener && !opener.isImage && this.brackets.length < this.numInside;
    const found = opener && !isInside ? this.target(opener, place) : null;
    this.numInside = Math.min(this.numInside, this.brackets.length);
    if (found) this.emphasize(opener.numDelimiters);
    const depth = found ? this.depthBetween(opener.node, null) : Infinity;
    if (depth > MAX_DEPTH) {
      this.say("]");
      return place + 1;
    }
    const node = { type: opener.isImage ? "image" : "link", href: found.href, title: found.title, depth };
    node.text = unescaped(this.text.slice(opener.place, place)).slice(0, MAX_LABEL);
    this.nodes.wrap(opener.node, null, node);
    this.nodes.remove(opener.node);
    if (!opener.isImage) this.numInside = this.brackets.length;
    return found.end;
  }

  // Where a link leads: (address "title"), [label], or the text itself as a label.
  target(opener, place) {
    const { text } = this;
    const written = text[place + 1] === "(" && at(TARGET, text, place + 1);
    if (written) {
      const [all, angled, plain, ...titles] = written;
      const title = titles.find((one) => one !== undefined);
      return { href: unescaped(angled ?? plain), title: title && unescaped(title), end: place + 1 + all.length };
    }
    const named = text[place + 1] === "[" && at(REFERENCE, text, place + 1);
    if (!named && place - opener.place > MAX_LABEL) return null;
    const label = named && named[1] ? named[1] : text.slice(opener.place, Math.min(place, opener.place + MAX_LABEL + 1));
    const known = this.links.get(labelOf(label));
    return known ? { ...known, end: place + 1 + (named ? named[0].length : 0) } : null;
  }

  address(place) {
    const found = at(ADDRESS, this.text, place);
    if (found) {
      const address = found[1] ?? found[2];
      this.nodes.add(linkTo(found[1] ? address : `mailto:${address}`, address));
      return place + found[0].length;
    }
    const broken = at(BREAK, this.text, place);
    if (broken) this.nodes.add({ type: "br" }); else this.say("<");
    return place + (broken ? broken[0].length : 1);
  }

  bare(place) {
    if (/[\p{L}\p{N}_]/u.test(this.text[place - 1] ?? " ")) return 0;
    const found = at(BARE, this.text, place);
    if (!found) return 0;
    let [address] = found;
    let numOpen = 0;
    for (const letter of address) numOpen += letter === "(" ? 1 : letter === ")" ? -1 : 0;
    for (;;) {
      const last = address[address.length - 1];
      if (last === ")" && numOpen < 0) numOpen += 1;
      else if (!/[?!.,:;*_~'"]/.test(last)) break;
      address = address.slice(0, -1);
    }
    if (address.length <= 8) return 0;
    this.nodes.add({ ...linkTo(/^www/i.test(address) ? `${PLAIN}//${address}` : address, address), isBare: true });
    return place + address.length;
  }

  // CommonMark's "process emphasis", over the delimiters from an index on.
  emphasize(first) {
    const { delimiters, nodes } = this;
    const open = []; // indices of those that may still open
    const bottoms = new Map(); // where the search for a partner ended in vain
    for (let index = first; index < delimiters.length; index += 1) {
      const closer = delimiters[index];
      while (closer.closes && closer.left) {
        const key = `${closer.letter}${closer.opens}${closer.length % 3}`;
        const bottom = bottoms.get(key) ?? -1;
        let place = open.length - 1;
        while (place >= 0 && open[place] > bottom && !fits(delimiters[open[place]], closer)) place -= 1;
        if (place < 0 || open[place] <= bottom) {
          bottoms.set(key, index - 1);
          break;
        }
        const opener = delimiters[open[place]];
        open.length = place + 1; // those between them have no partner
        this.join(opener, closer);
        if (!opener.left) {
          open.pop();
          nodes.remove(opener.node);
        }
        if (!closer.left) nodes.remove(closer.node);
      }
      if (closer.opens && closer.left) open.push(index);
    }
    delimiters.length = first;
  }

  join(opener, closer) {
    const isTilde = opener.letter === "~";
    const count = isTilde ? opener.left : Math.min(2, opener.left, closer.left);
    for (const one of [opener, closer]) {
      one.left -= count;
      one.node.text = one.letter.repeat(one.left);
    }
    const depth = this.depthBetween(opener.node, closer.node);
    if (depth > MAX_DEPTH) return; // the marks are gone, and the text stays
    this.nodes.wrap(opener.node, closer.node, { type: isTilde ? "del" : count === 2 ? "strong" : "em", depth });
  }
}

const linkTo = (href, text) => {
  const inner = new Nodes();
  inner.add({ type: "escape", text });
  return { type: "link", href, text, inner, depth: 1 };
};

function fits(opener, closer) {
  if (opener.letter !== closer.letter) return false;
  if (opener.letter === "~") return opener.left === closer.left;
  const isThree = (opener.length + closer.length) % 3 === 0 && (opener.length % 3 || closer.length % 3);
  return !((opener.closes || closer.opens) && isThree);
}

function tokensOf(nodes, isInLink) {
  const tokens = [];
  for (let node = nodes.first; node; node = node.after) {
    const { type, text, href, title, inner } = node;
    const last = tokens[tokens.length - 1];
    if (type === "text" && last?.type === "text") last.text += text;
    else if (!inner) tokens.push({ type, text });
    else if (isInLink && node.isBare) tokens.push({ type: "escape", text });
    else tokens.push({ type, text, href, title, tokens: tokensOf(inner, isInLink || type === "link") });
  }
  return tokens;
}

// Args: the text of a paragraph, and a Map of label -> {href, title}.
export const inlineTokens = (text, links) => new Line(text.trim(), links).tokens();
