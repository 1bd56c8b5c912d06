"""Limits on schemas and grammars, which may come from strangers."""

from __future__ import annotations

from typing import Any

MAX_BYTES = 256 << 10  # of a schema, an expression or a grammar
MAX_DEPTH = 64  # of objects, lists and brackets within each other

# llguidance's budgets; what takes more is an error, never a long wait.
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
}
