"""What holding a reply to a grammar costs: once for a tokenizer, once for a grammar, and a token.

`python scripts/bench/grammar.py [--tokenizer MODEL] [--step MS] [--model MODEL] [--tokens N]`

Answers that are known are replayed under their grammars, so that nothing but the grammar is
measured; each document is seen cold, its grammar just compiled, and again, as the next reply sees
it. With --model its own steps are timed as well, plain and held in turns.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from phimlx.generation.grammar.compiler import GrammarCompiler
from phimlx.generation.grammar.reply_form import ReplyForm
from phimlx.generation.options import GenerationOptions
from phimlx.hub.resolve import resolve
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

ROUNDS = 3
PROSE = (
    "The receipt is from a bakery near the station. It lists two loaves of rye, a bag of rolls and "
    "a coffee, paid in cash on a Tuesday morning; the tax is given apart, and the change as well. "
)
TEXT: dict[str, Any] = {"type": "string"}
ITEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": TEXT, "price": {"type": "number"}, "tags": {"type": "array", "items": TEXT},
    },
    "required": ["name", "price", "tags"],
    "additionalProperties": False,
}  # fmt: skip
RECEIPT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "shop": TEXT, "date": {"type": "string", "format": "date"},
        "items": {"type": "array", "items": ITEM}, "paid": {"enum": ["cash", "card"]},
    },
    "required": ["shop", "date", "items", "paid"],
    "additionalProperties": False,
}  # fmt: skip
BOUGHT = {
    "shop": "Café Müller, Hauptstraße 5",
    "date": "2026-03-14",
    "items": [
        {"name": f"loaf of rye no. {place}", "price": 3.5 + place, "tags": ["bread", "organic"]}
        for place in range(8)
    ],
    "paid": "cash",
}
TOOLS = [{"name": "look_up", "parameters": ITEM}, {"name": "note", "parameters": RECEIPT}]

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "receipt": ({"schema": RECEIPT}, json.dumps(BOUGHT, ensure_ascii=False)),
    "any JSON": ({"schema": {}}, json.dumps(BOUGHT, ensure_ascii=False)),
    "long string": ({"schema": TEXT}, json.dumps(PROSE * 4)),
    "tools, prose": ({"tools": TOOLS}, PROSE * 4),
    "expression": ({"regex": r"([A-Z][^.;]*[.;] ?)+ ?"}, PROSE.split(";")[0] + "."),
}


def replay(compiler: GrammarCompiler, source: str, ids: list[int], vocabulary: int) -> list[float]:
    """Milliseconds for each token of an answer: to take it, and to tell what may come next."""
    constraint, found = compiler.compile(source), []
    for token in ids:
        began = time.thread_time()  # whatever else the machine does
        assert constraint.allowed(vocabulary)[0, token], "the answer is not of its grammar"
        constraint.advance([token])
        found.append(1000 * (time.thread_time() - began))
    return found


def replays(tokenizer: Tokenizer, step: float) -> None:
    vocabulary = tokenizer.vocab_size
    ends = set(tokenizer.control_tokens.values()) or {0}
    compiler = GrammarCompiler(tokenizer, vocabulary, {min(ends)})
    began = time.perf_counter()
    compiler.compile(json.dumps({"grammars": [{"lark_grammar": 'start: "a"'}]}))
    print(
        f"vocabulary {vocabulary:,}: the tokenizer's form took {time.perf_counter() - began:.2f} s"
    )
    print(f"{'ms':14}{'tokens':>8}{'compile':>9}{'median':>9}{'mean':>9}{'worst':>9}{'again':>9}{'of a step':>11}")  # fmt: skip  # noqa: E501
    for name, (options, answer) in CASES.items():
        form = ReplyForm.read(GenerationOptions(**options))
        assert form is not None
        source = form.source("none", tokenizer.control_tokens)
        ids = tokenizer.encode(answer, at_start=False)
        began = time.perf_counter()
        compiler.compile(source)
        compiled = 1000 * (time.perf_counter() - began)
        cold, again = (replay(compiler, source, ids, vocabulary) for _ in range(2))
        print(
            f"{name:14}{len(ids):8,}{compiled:9.1f}{median(cold):9.3f}{mean(cold):9.3f}"
            f"{max(cold):9.2f}{mean(again):9.3f}{mean(cold) / step:11.1%}"
        )


def steps(model: str, tokens: int) -> None:
    """Time a model's steps, plain and held, in turns."""
    import phimlx

    phi = phimlx.load(model)
    # The same tokens both ways: digits, whatever the model would rather say.
    digits = dict.fromkeys(phi.encode("0123456789", raw=True), 100.0)
    options = {"max_tokens": tokens, "logit_bias": digits, "prompt_lookup": False, "seed": 0}
    held = {"regex": "[0-9]*"}
    found: dict[str, list[float]] = {"plain": [], "held": []}
    for _ in range(ROUNDS):
        for name, more in (("plain", {}), ("held", held)):
            stats = phi.generate("Count.", **options, **more).stats
            found[name].append(1000 * stats.generate_seconds / (stats.generated_tokens - 1))
    plain, constrained = (median(times) for times in found.values())
    ratio = constrained / plain - 1
    print(f"{phi.name}: a step takes {plain:.2f} ms, held {constrained:.2f} ms: {ratio:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", default="nano", help="model or folder whose it is")
    parser.add_argument("--step", type=float, default=10.0, help="ms of a step to compare with")
    parser.add_argument("--model", help="time the steps of this one as well")
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    folder = Path(options.tokenizer)
    replays(Tokenizer.load(folder if folder.is_dir() else resolve(options.tokenizer)), options.step)
    if options.model:
        steps(options.model, options.tokens)


if __name__ == "__main__":
    main()
