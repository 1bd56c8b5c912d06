// Markdown to nodes. Nothing of a model's text is ever taken as HTML.

import { highlight } from "./highlight.js";
import { renderMath } from "./math.js";

const DEEPEST = 20;

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// Blocks of a text: each with where it begins, so that only what grows is drawn anew.
export function split(text) {
  const lines = text.split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    const begin = at, line = lines[at];
    if (!line.trim()) { at += 1; continue; }
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
    if (fence) {
      const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (at += 1; at < lines.length && !close.test(lines[at]);) at += 1;
      blocks.push({ kind: "code", language: fence[2].trim().split(/\s/)[0], text: lines.slice(begin + 1, at).join("\n"), source: lines.slice(begin, at + 1).join("\n") });
      at += 1;
      continue;
    }
    const math = /^\s*(\$\$|\\\[)/.exec(line);
    if (math) {
      const close = math[1] === "$$" ? "$$" : "\\]";
      let body = line.trim().slice(2);
      while (!body.includes(close) && at + 1 < lines.length) body += `\n${lines[++at]}`;
      at += 1;
      const end = body.indexOf(close);
      const rest = end < 0 ? "" : body.slice(end + 2).trim();
      blocks.push({ kind: "math", text: end < 0 ? body : body.slice(0, end), source: lines.slice(begin, at).join("\n") });
      if (rest) blocks.push({ kind: "paragraph", text: rest, source: rest });
      continue;
    }
    const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (heading) {
      blocks.push({ kind: "heading", level: heading[1].length, text: heading[2], source: line });
      at += 1;
      continue;
    }
    if (/^ {0,3}([-*_])\s*(?:\1\s*){2,}$/.test(line)) {
      blocks.push({ kind: "rule", source: line });
      at += 1;
      continue;
    }
    if (/^ {0,3}>/.test(line)) {
      while (at < lines.length && lines[at].trim() && (/^ {0,3}>/.test(lines[at]) || !begins(lines[at]))) at += 1;
      const own = lines.slice(begin, at);
      blocks.push({ kind: "quote", text: own.map((each) => each.replace(/^ {0,3}> ?/, "")).join("\n"), source: own.join("\n") });
      continue;
    }
    const item = ITEM.exec(line);
    if (item) {
      const ordered = /\d/.test(item[2]);
      const another = (text) => { // a list of the other kind begins
        const found = ITEM.exec(text);
        return found && found[1].length < 2 && /\d/.test(found[2]) !== ordered;
      };
      for (at += 1; at < lines.length && !another(lines[at]); at += 1) {
        const next = lines[at];
        if (!next.trim()) {
          if (!/^\s+\S/.test(lines[at + 1] || "") && !ITEM.test(lines[at + 1] || "")) break;
        } else if (!/^\s/.test(next) && !ITEM.test(next) && (begins(next) || !lines[at - 1].trim())) break;
      }
      const own = lines.slice(begin, at);
      blocks.push({ kind: "list", ordered, start: parseInt(item[2], 10), text: own, source: own.join("\n") });
      continue;
    }
    if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] || "") && lines[at + 1].includes("-")) {
      for (at += 2; at < lines.length && lines[at].includes("|");) at += 1;
      const own = lines.slice(begin, at);
      blocks.push({ kind: "table", text: own, source: own.join("\n") });
      continue;
    }
    for (at += 1; at < lines.length && lines[at].trim() && !begins(lines[at]);) at += 1;
    blocks.push({ kind: "paragraph", text: lines.slice(begin, at).join("\n"), source: lines.slice(begin, at).join("\n") });
  }
  return blocks;
}

const ITEM = /^(\s{0,3})([-*+]|\d{1,9}[.)])(\s+|$)/;
const begins = (line) => /^ {0,3}(#{1,6}\s|>|`{3}|~{3}|\$\$|\\\[)/.test(line) || ITEM.test(line);

export function render(block, depth = 0) {
  switch (block.kind) {
    case "code": return codeBlock(block.text, block.language);
    case "math": return renderMath(block.text, true);
    case "heading": return element(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text));
    case "rule": return element("hr");
    case "quote": return element("blockquote", {}, ...inner(block.text, depth));
    case "list": return list(block, depth);
    case "table": return table(block.text);
    default: return element("p", {}, inline(block.text));
  }
}

function inner(text, depth) {
  if (depth >= DEEPEST) return [text];
  return split(text).map((block) => render(block, depth + 1));
}

function list(block, depth) {
  const items = [];
  for (const line of block.text) {
    const found = ITEM.exec(line);
    if (found && found[1].length < 2 + (items.length ? 0 : 2)) items.push([line.slice(found[0].length)]);
    else items.at(-1).push(line.replace(/^ {1,4}|^\t/, ""));
  }
  const made = items.map((lines) => {
    const children = inner(lines.join("\n"), depth);
    const only = children.length && children[0].tagName === "P" ? children[0] : null;
    return element("li", {}, ...(only ? [...only.childNodes, ...children.slice(1)] : children));
  });
  return element(block.ordered ? "ol" : "ul", { start: block.ordered ? String(block.start) : undefined }, ...made);
}

function table([head, , ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((each) => each.trim());
  const row = (name, line) => element("tr", {}, ...cells(line).map((each) => element(name, {}, inline(each))));
  return element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...rows.map((each) => row("td", each))));
}

export function codeBlock(text, language) {
  const copy = element("button", { type: "button", onclick: () => copyText(text, copy) }, "Copy");
  return element("figure", {}, element("figcaption", {}, language || "code", copy), element("pre", { tabindex: "0" }, element("code", {}, highlight(text, language))));
}

export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const said = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = said; }, 1200);
}

const INLINE = [
  [/^\\([\\`*_{}[\]()#+\-.!|~>$])/, (found) => found[1]],
  [/^(`+)(?!`)([\s\S]*?[^`])\1(?!`)/, (found) => element("code", {}, found[2].trim() || found[2])],
  [/^\\\(([\s\S]+?)\\\)/, (found) => renderMath(found[1], false)],
  [/^\$\$([\s\S]+?)\$\$/, (found) => renderMath(found[1], true)],
  [/^\$(?!\s)([^$\n]*?[^\s$\\])\$(?!\d)/, (found) => renderMath(found[1], false)],
  [/^\*\*(?=\S)([\s\S]*?\S)\*\*/, (found, depth) => element("strong", {}, inline(found[1], depth))],
  [/^__(?=\S)([\s\S]*?\S)__(?!\w)/, (found, depth) => element("strong", {}, inline(found[1], depth))],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (found, depth) => element("del", {}, inline(found[1], depth))],
  [/^\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/, (found, depth) => element("em", {}, inline(found[1], depth))],
  [/^_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)/, (found, depth) => element("em", {}, inline(found[1], depth))],
  [/^!?\[([^\]]*)\]\(\s*<?([^\s)>]+)>?(?:\s+"[^"]*")?\s*\)/, (found, depth) => link(found[2], inline(found[1] || found[2], depth))],
  [/^<?(https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"])>?/, (found) => link(found[1], found[1])],
  [/^ {2,}\n|^\\\n/, () => element("br")],
];

function inline(text, depth = 0) {
  const made = document.createDocumentFragment();
  if (depth > DEEPEST) {
    made.append(text);
    return made;
  }
  let plain = "";
  for (let at = 0; at < text.length;) {
    const rest = /[\\`$*_~![<h ]/.test(text[at]) ? text.slice(at, at + 4000) : "";
    const wordBefore = /\w/.test(text[at - 1] || "");
    let found, make;
    for (const [pattern, maker] of rest ? INLINE : []) {
      if (wordBefore && (rest[0] === "_" || rest[0] === "h")) break;
      found = pattern.exec(rest);
      if (found) { make = maker; break; }
    }
    if (!found) { plain += text[at]; at += 1; continue; }
    made.append(plain, make(found, depth + 1));
    plain = "";
    at += found[0].length;
  }
  made.append(plain);
  return made;
}

function link(address, child) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return element("span", {}, child);
  return element("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank" }, child);
}

// Draws a text into a place, again and again as it grows: blocks that stay the same stay.
export class Drawing {
  constructor(place) {
    this.place = place;
    this.sources = [];
  }

  draw(text) {
    const blocks = split(text);
    let same = 0;
    while (same < blocks.length && same < this.sources.length && blocks[same].source === this.sources[same]) same += 1;
    while (this.place.childNodes.length > same) this.place.lastChild.remove();
    for (const block of blocks.slice(same)) this.place.append(render(block));
    this.sources = blocks.map((block) => block.source);
  }
}
