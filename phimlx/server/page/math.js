// TeX as models write it to MathML, which browsers draw. What is not known stays as it was written.

const NS = "http://www.w3.org/1998/Math/MathML";
const LETTERS = {
  alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ϵ", varepsilon: "ε", zeta: "ζ", eta: "η",
  theta: "θ", vartheta: "ϑ", iota: "ι", kappa: "κ", lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π",
  rho: "ρ", sigma: "σ", tau: "τ", upsilon: "υ", phi: "ϕ", varphi: "φ", chi: "χ", psi: "ψ", omega: "ω",
  Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ", Xi: "Ξ", Pi: "Π", Sigma: "Σ", Upsilon: "Υ", Phi: "Φ",
  Psi: "Ψ", Omega: "Ω", infty: "∞", partial: "∂", nabla: "∇", hbar: "ℏ", ell: "ℓ", Re: "ℜ", Im: "ℑ",
  emptyset: "∅", varnothing: "∅", aleph: "ℵ", degree: "°", ldots: "…", dots: "…", cdots: "⋯", vdots: "⋮", ddots: "⋱", prime: "′",
};
const OPERATORS = {
  times: "×", cdot: "⋅", div: "÷", pm: "±", mp: "∓", ast: "∗", star: "⋆", circ: "∘", bullet: "•", oplus: "⊕", otimes: "⊗",
  le: "≤", leq: "≤", ge: "≥", geq: "≥", ne: "≠", neq: "≠", approx: "≈", equiv: "≡", sim: "∼", simeq: "≃", cong: "≅", propto: "∝", ll: "≪", gg: "≫",
  in: "∈", notin: "∉", ni: "∋", subset: "⊂", subseteq: "⊆", supset: "⊃", supseteq: "⊇", cup: "∪", cap: "∩", setminus: "∖",
  forall: "∀", exists: "∃", neg: "¬", lnot: "¬", land: "∧", wedge: "∧", lor: "∨", vee: "∨",
  to: "→", rightarrow: "→", leftarrow: "←", Rightarrow: "⇒", Leftarrow: "⇐", iff: "⇔", implies: "⟹", Leftrightarrow: "⇔", leftrightarrow: "↔", mapsto: "↦", uparrow: "↑", downarrow: "↓",
  mid: "∣", parallel: "∥", perp: "⊥", angle: "∠", therefore: "∴", because: "∵", langle: "⟨", rangle: "⟩", lfloor: "⌊", rfloor: "⌋", lceil: "⌈", rceil: "⌉",
  lbrace: "{", rbrace: "}", "{": "{", "}": "}", "%": "%", "$": "$", "#": "#", "&": "&", "_": "_", "|": "‖", colon: ":",
};
const LARGE = { sum: "∑", prod: "∏", coprod: "∐", int: "∫", iint: "∬", iiint: "∭", oint: "∮", bigcup: "⋃", bigcap: "⋂" };
const NAMED = new Set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp det dim ker gcd lcm arg deg hom".split(" "));
const LIMITS = new Set("lim max min sup inf limsup liminf argmax argmin".split(" "));
const SPACES = { ",": ".17em", ":": ".22em", ";": ".28em", " ": ".25em", quad: "1em", qquad: "2em", "!": "-.17em", thinspace: ".17em" };
const ACCENTS = { hat: "^", widehat: "^", bar: "¯", overline: "¯", vec: "→", tilde: "~", widetilde: "~", dot: "˙", ddot: "¨" };
const VARIANTS = { mathbf: "bold", boldsymbol: "bold", bm: "bold", mathbb: "double-struck", mathcal: "script", mathscr: "script", mathfrak: "fraktur", mathrm: "normal", mathit: "italic", mathsf: "sans-serif", mathtt: "monospace" };
const TEXTS = new Set("text textbf textit textrm mbox operatorname".split(" "));
const FENCES = { matrix: ["", ""], pmatrix: ["(", ")"], bmatrix: ["[", "]"], Bmatrix: ["{", "}"], vmatrix: ["|", "|"], Vmatrix: ["‖", "‖"], cases: ["{", ""], aligned: ["", ""], align: ["", ""], "align*": ["", ""], array: ["", ""], gathered: ["", ""], split: ["", ""] };
const SKIPPED = new Set("displaystyle textstyle limits nolimits nonumber big Big bigg Bigg bigl bigr Bigl Bigr tag label".split(" "));
const DEEPEST = 60;

function node(name, ...children) {
  const made = document.createElementNS(NS, name);
  made.append(...children);
  return made;
}

class Reader {
  constructor(tex) {
    this.tokens = tex.match(/\\[A-Za-z]+\*?|\\[\s\S]|[0-9]+(?:\.[0-9]+)?|\s+|[\s\S]/gu) || [];
    this.at = 0;
    this.depth = 0;
  }

  peek() {
    while (/^\s+$/.test(this.tokens[this.at] || "")) this.at += 1;
    return this.tokens[this.at];
  }

  next() {
    this.peek();
    return this.tokens[this.at++];
  }

  row(...ends) {
    const items = [];
    if (++this.depth > DEEPEST) throw new RangeError("deep");
    while (this.peek() !== undefined && !ends.includes(this.peek())) items.push(this.scripts());
    this.depth -= 1;
    return items.length === 1 ? items[0] : node("mrow", ...items);
  }

  scripts() {
    const base = this.atom();
    let below, above;
    for (;;) {
      const token = this.peek();
      if (token === "_" && !below) { this.next(); below = this.atom(); }
      else if (token === "^" && !above) { this.next(); above = this.atom(); }
      else if (token === "'") { this.next(); above = node("mrow", ...(above ? [above] : []), node("mo", "′")); }
      else break;
    }
    const under = base.dataset?.limits;
    if (below && above) return node(under ? "munderover" : "msubsup", base, below, above);
    if (below) return node(under ? "munder" : "msub", base, below);
    if (above) return node(under ? "mover" : "msup", base, above);
    return base;
  }

  // The text between braces, as it stands.
  words() {
    if (this.peek() !== "{") return this.next() || "";
    this.at += 1;
    let text = "", depth = 1;
    while (this.at < this.tokens.length) {
      const token = this.tokens[this.at++];
      if (token === "{") depth += 1;
      if (token === "}" && --depth === 0) break;
      text += token;
    }
    return text;
  }

  fence(token) {
    if (token === undefined || token === ".") return "";
    return token.startsWith("\\") ? OPERATORS[token.slice(1)] || "" : token;
  }

  atom() {
    const token = this.next();
    if (token === undefined) return node("mrow");
    if (token === "{") {
      const made = this.row("}");
      this.next();
      return made;
    }
    if (/^[0-9]/.test(token)) return node("mn", token);
    if (!token.startsWith("\\")) {
      if (/^\p{L}$/u.test(token)) return node("mi", token);
      return node("mo", token === "-" ? "−" : token === "*" ? "∗" : token);
    }
    return this.command(token.slice(1));
  }

  command(name) {
    if (LETTERS[name]) return node("mi", LETTERS[name]);
    if (LARGE[name]) {
      const made = node("mo", LARGE[name]);
      made.setAttribute("largeop", "true");
      if (!name.includes("int")) made.dataset.limits = "1";
      return made;
    }
    if (OPERATORS[name]) return node("mo", OPERATORS[name]);
    if (NAMED.has(name)) return node("mrow", node("mi", name), node("mo", "\u2061"));
    if (LIMITS.has(name)) {
      const made = node("mo", name);
      made.dataset.limits = "1";
      return made;
    }
    if (SPACES[name]) {
      const made = node("mspace");
      made.setAttribute("width", SPACES[name]);
      return made;
    }
    if (ACCENTS[name]) {
      const made = node("mover", this.atom(), node("mo", ACCENTS[name]));
      made.setAttribute("accent", "true");
      return made;
    }
    if (VARIANTS[name]) {
      const made = node("mstyle", this.atom());
      for (const each of made.querySelectorAll("mi, mn")) each.textContent = styled(each.textContent, VARIANTS[name]);
      if (VARIANTS[name] === "normal") for (const each of made.querySelectorAll("mi")) each.setAttribute("mathvariant", "normal");
      return made;
    }
    if (TEXTS.has(name)) return node("mtext", this.words().replace(/\\([^A-Za-z])/g, "$1"));
    if (name === "frac" || name === "dfrac" || name === "tfrac" || name === "cfrac") return node("mfrac", this.atom(), this.atom());
    if (name === "binom") {
      const made = node("mfrac", this.atom(), this.atom());
      made.setAttribute("linethickness", "0");
      return node("mrow", node("mo", "("), made, node("mo", ")"));
    }
    if (name === "sqrt") {
      if (this.peek() !== "[") return node("msqrt", this.atom());
      this.next();
      const index = this.row("]");
      this.next();
      return node("mroot", this.atom(), index);
    }
    if (name === "boxed" || name === "underline" || name === "mathop") {
      const made = node("mrow", this.atom());
      if (name === "boxed") made.setAttribute("class", "boxed");
      return made;
    }
    if (name === "left") {
      const open = this.fence(this.next());
      const inner = this.row("\\right");
      this.next();
      return node("mrow", node("mo", open), inner, node("mo", this.fence(this.next())));
    }
    if (name === "begin") return this.table();
    if (SKIPPED.has(name)) {
      if (name === "tag" || name === "label") this.words();
      return node("mrow");
    }
    return node("mtext", `\\${name}`);
  }

  table() {
    const kind = this.words();
    if (!FENCES[kind]) return node("mtext", `\\begin{${kind}}`);
    if (kind === "array") this.words();
    const rows = [[]];
    while (this.peek() !== undefined && this.peek() !== "\\end") {
      rows.at(-1).push(node("mtd", this.row("&", "\\\\", "\\end")));
      const token = this.peek();
      if (token === "&") this.next();
      else if (token === "\\\\") { this.next(); rows.push([]); }
    }
    this.next();
    this.words();
    const [open, close] = FENCES[kind];
    const table = node("mtable", ...rows.filter((row) => row.length).map((row) => node("mtr", ...row)));
    if (kind === "cases" || kind.includes("align") || kind === "split") table.setAttribute("columnalign", "left");
    return node("mrow", ...(open ? [node("mo", open)] : []), table, ...(close ? [node("mo", close)] : []));
  }
}

const BASES = { bold: [0x1d400, 0x1d41a, 0x1d7ce], "double-struck": [0x1d538, 0x1d552, 0x1d7d8], script: [0x1d49c, 0x1d4b6], fraktur: [0x1d504, 0x1d51e], "sans-serif": [0x1d5a0, 0x1d5ba, 0x1d7e2], monospace: [0x1d670, 0x1d68a, 0x1d7f6] };
const EXCEPTIONS = { "double-struck": { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" }, script: { B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" }, fraktur: { C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" } };

function styled(text, variant) {
  const bases = BASES[variant];
  if (!bases) return text;
  return Array.from(text, (letter) => {
    const other = EXCEPTIONS[variant]?.[letter];
    if (other) return other;
    const [first, base] = /[A-Z]/.test(letter) ? ["A", bases[0]] : /[a-z]/.test(letter) ? ["a", bases[1]] : /[0-9]/.test(letter) ? ["0", bases[2]] : ["", 0];
    return base ? String.fromCodePoint(base + letter.charCodeAt(0) - first.charCodeAt(0)) : letter;
  }).join("");
}

export function renderMath(tex, isBlock) {
  let inner;
  try {
    inner = new Reader(tex).row();
  } catch {
    inner = node("mtext", tex);
  }
  const made = node("math", inner);
  made.setAttribute("display", isBlock ? "block" : "inline");
  made.setAttribute("aria-label", tex);
  return made;
}
