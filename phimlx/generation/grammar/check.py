"""Whether calls of a tool can be held to its schema, told before a model is asked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from phimlx.generation.grammar.compiler import compile_grammar
from phimlx.generation.grammar.reply_form import ReplyForm


def check_tool(function: Mapping[str, Any]) -> None:
    """Compile the grammar of a call.

    Args:
        function: as `phimlx.prompt.tools.read_tools` gives it.

    Raises:
        GrammarError: where no reply can be held to it, or that takes more than the limits.
    """
    compile_grammar(_bytes(), ReplyForm(None, (function,), "required").source("none", {}))


@cache
def _bytes() -> Any:
    """A tokenizer whose tokens are bytes: grammars are about those, whatever the model."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
