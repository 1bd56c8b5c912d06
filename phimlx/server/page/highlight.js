// Colours for code: comments, strings, numbers and keywords, by families of languages.

const words = (text) => new Set(text.split(" "));
const C_WORDS = words("abstract as async await auto bool boolean break case catch char class const constexpr continue default defer delete do double else enum export extends extern false final finally float fn for foreach func function go goto guard if impl implements import in include inline int interface is let long loop match mod module move mut namespace new nil null nullptr operator override package private protected pub public readonly ref return self short signed sizeof static struct super switch template this throw throws trait true try type typedef typename typeof union unsafe unsigned use using val var virtual void volatile when where while with yield");
const PYTHON_WORDS = words("and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return self True try while with yield");
const SHELL_WORDS = words("alias case do done elif else esac exit export fi for function if in local read return set shift then trap unset until while");
const SQL_WORDS = words("add all alter and as asc begin between by case commit constraint create cross default delete desc distinct drop else end exists foreign from full group having if in index inner insert into is join key left like limit not null offset on or order outer primary references returning right rollback select set table then union unique update using values view when where with");
const LISP_LINE = "#[^\\n]*";
const DOUBLE = `"(?:\\\\[\\s\\S]|[^"\\\\\\n])*"?`;
const SINGLE = `'(?:\\\\[\\s\\S]|[^'\\\\\\n])*'?`;

const FAMILIES = [
  { names: words("python py ruby rb"), comment: LISP_LINE, string: `"""[\\s\\S]*?(?:"""|$)|'''[\\s\\S]*?(?:'''|$)|${DOUBLE}|${SINGLE}`, words: PYTHON_WORDS },
  { names: words("sh bash zsh shell console fish make makefile dockerfile toml yaml yml ini r perl"), comment: LISP_LINE, string: `${DOUBLE}|${SINGLE}`, words: SHELL_WORDS },
  { names: words("sql"), comment: "--[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)", string: `${SINGLE}|${DOUBLE}`, words: SQL_WORDS, ignoresCase: true },
  { names: words("html xml svg"), comment: "<!--[\\s\\S]*?(?:-->|$)", string: `${DOUBLE}|${SINGLE}`, words: new Set() },
  { names: words("text txt plain markdown md"), comment: "(?!)", string: "(?!)", words: new Set() },
];
const C_FAMILY = { comment: "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)", string: `\`(?:\\\\[\\s\\S]|[^\`\\\\])*\`?|${DOUBLE}|${SINGLE}`, words: C_WORDS };

// Nodes for a text of code, none of it taken as markup.
export function highlight(text, language) {
  const family = FAMILIES.find((each) => each.names.has((language || "text").toLowerCase())) || C_FAMILY;
  const pattern = new RegExp(`(?<c>${family.comment})|(?<s>${family.string})|(?<n>\\b\\d[\\w.]*)|(?<w>[A-Za-z_]\\w*)`, "g");
  const made = document.createDocumentFragment();
  let end = 0;
  for (const found of text.matchAll(pattern)) {
    if (!found[0]) continue;
    const { c, s, n, w } = found.groups;
    const word = w && family.words.has(family.ignoresCase ? w.toLowerCase() : w);
    const kind = c ? "c" : s ? "s" : n ? "n" : word ? "k" : "";
    if (!kind) continue;
    made.append(text.slice(end, found.index));
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = found[0];
    made.append(span);
    end = found.index + found[0].length;
  }
  made.append(text.slice(end));
  return made;
}
