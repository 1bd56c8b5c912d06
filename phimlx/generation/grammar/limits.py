"""Limits on schemas and grammars, which may come from strangers."""

from __future__ import annotations

import re
from typing import Any

from phimlx.errors import GrammarError
from phimlx.sizes import size_text

MAX_BYTES = 256_000  # of a schema
MAX_RULES_BYTES = 64_000  # of a grammar
MAX_EXPRESSION_BYTES = 16_000  # of a regular expression; each step costs time in its length
MAX_COUNT = 4096  # repetitions that an expression counts, likewise
MAX_DEPTH = 64  # of objects, lists and brackets within each other
MAX_REACH = 4096  # levels of a schema, and of each place that it refers to, together
MAX_MULTIPLE = 10_000  # multipleOf, whose expression has as many states

# llguidance recurses over what it compiles, up to 16 kB a level, and overflows its stack silently.
STACK_BYTES = 128 << 20
COMPILE_SECONDS = 10.0

# llguidance's budgets; what takes more is an error, never a long wait.
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 500_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 50_000,
}

_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def check_expression(name: str, text: str, most: int = MAX_EXPRESSION_BYTES) -> None:
    """Raise GrammarError for an expression, or a grammar of them, that is beyond the limits."""
    if len(text.encode(errors="replace")) > most:
        raise GrammarError(f"The {name} has more than {size_text(most)}.")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise GrammarError(f"The {name} is nested deeper than {MAX_DEPTH} brackets.")
    counts = (count for found in _COUNT.finditer(text) for count in found.groups() if count)
    if any(len(count) > 9 or int(count) > MAX_COUNT for count in counts):
        raise GrammarError(f"The {name} counts to more than {MAX_COUNT:,} repetitions.")
