"""The form of a whole reply as one grammar: reasoning, then an answer of a shape or calls of tools.

The rules are Lark's as llguidance reads them:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phimlx.errors import GrammarError, shortened
from phimlx.generation.grammar.limits import (
    MAX_EXPRESSION_BYTES,
    MAX_RULES_BYTES,
    check_expression,
)
from phimlx.generation.grammar.schema import read_schema, schema_source
from phimlx.generation.options import GenerationOptions
from phimlx.prompt.reply_parser import CALL, END_CALL, END_THINK, THINK
from phimlx.prompt.tools import read_tools

CHOICES = ("auto", "none", "required")

Reasoning = Literal["none", "optional", "opened"]
"""Whether a reply may begin with reasoning, or the prompt has opened it already."""

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

# Text that opens no call, as `ReplyParser` reads it, and text up to the call that it opens: before
# the word stands nothing, or what is surely no part of one.
FREE_TEXT = r"""
FREE: /(?s:.+)/ & ~WORD_CALLS & ~/(?s:.*)<\|tool_call\|>(?s:.*)/
WORD_CALLS: /((?s:.*)[^0-9A-Za-z_.])?functools\s*[\[{](?s:.*)/
"""
WORD_CALL = r"""
word_call: word call_list "]"
word[lazy]: /((?s:.*)[\x00-\x2d\x2f\x3a-\x40\x5b-\x5e\x60\x7b-\x7f])?functools\[/
"""
THOUGHT = r"""
THOUGHT: /(?s:.+)/ & ~/(?s:.*)<\/think>(?s:.*)/
thought_end[lazy]: /(?s:.*)<\/think>/
blank: /\s{1,4}/
"""


@dataclass(frozen=True)
class ReplyForm:
    """What a reply consists of.

    Attributes:
        answer: the grammar of the answer, named "answer"; any text where None.
        tools: functions that may be called.
        choice: "auto", "none", "required", or the name of a tool.
    """

    answer: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    choice: str = "auto"

    @classmethod
    def read(cls, options: GenerationOptions) -> ReplyForm | None:
        """Read what is asked of a reply; None where it may be anything.

        Raises:
            GrammarError: for a shape that is none, or a choice of no tool.
            PromptError: for tools that are none.
        """
        functions = tuple(read_tools(options.tools)) if options.tools else ()
        choice = _choice(options.tool_choice, [function["name"] for function in functions])
        answer: dict[str, Any] | None = None
        if options.schema is not None:
            answer = schema_source("answer", read_schema(options.schema))
        elif options.regex is not None:
            regex = _checked("regex", options.regex, MAX_EXPRESSION_BYTES)
            answer = {"name": "answer", "lark_grammar": f"start: /{_inside_slashes(regex)}/"}
        elif options.grammar is not None:
            rules = _checked("grammar", options.grammar, MAX_RULES_BYTES)
            answer = {"name": "answer", "lark_grammar": rules}
        if answer is None and not functions:
            return None
        return cls(answer, functions, choice)

    def source(self, reasoning: Reasoning, control_tokens: Mapping[str, int]) -> str:
        """The grammar in llguidance's JSON form, for a tokenizer with these control tokens."""
        rules = ["start: " + _REASONED[reasoning]]
        parts: list[Mapping[str, Any]] = []
        if reasoning != "none":
            rules += _thought(control_tokens)
        answers = []
        if self.choice in ("auto", "none"):
            answers.append("FREE?" if self.answer is None else "@answer")
            if self.answer is None:
                rules.append(FREE_TEXT)
            else:
                parts.append(self.answer)
        called = self._called
        if called:
            # Text may stand before a call, except where the answer has a shape.
            before = "FREE? " if self.choice == "auto" and self.answer is None else ""
            opened, closed = (_token(each, control_tokens) for each in (CALL, END_CALL))
            answers.append(f'{before}{opened} "[" call_list "]" {closed}')
            if before:
                answers.append("word_call")
                rules.append(WORD_CALL)
            more = "" if self.choice in self._names else ' (", " call)*'
            rules.append(f"call_list: call{more}")
            rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(called))))
            for index, tool in enumerate(called):
                name = json.dumps(json.dumps(tool["name"], ensure_ascii=False))[1:-1]
                begun = f'"{{\\"name\\": {name}, \\"arguments\\": "'
                rules.append(f'call_{index}: {begun} @arguments_{index} "}}"')
                parts.append(schema_source(f"arguments_{index}", _parameters(tool), lenient=True))
        rules.append("reply: " + " | ".join(answers))
        whole = {"name": "reply", "lark_grammar": "\n".join(rules)}
        return json.dumps({"grammars": [whole, *parts]})

    @property
    def may_call(self) -> bool:
        """Whether the reply may hold calls."""
        return bool(self._called)

    @property
    def _names(self) -> list[str]:
        return [tool["name"] for tool in self.tools]

    @property
    def _called(self) -> list[Mapping[str, Any]]:
        """The tools that may be called."""
        if self.choice == "none":
            return []
        return [tool for tool in self.tools if self.choice in (*CHOICES, tool["name"])]


_REASONED = {
    "none": "reply",
    "optional": "(think thoughts blank?)? reply",
    "opened": "thoughts blank? reply",
}


def _thought(control_tokens: Mapping[str, int]) -> list[str]:
    """Rules for reasoning, whose tags may be control tokens and may be spelled as text."""
    begins, ends = [json.dumps(THINK)], ["thought_end"]
    if THINK in control_tokens:
        begins.append(_token(THINK, control_tokens))
    if END_THINK in control_tokens:
        ends.append(f"THOUGHT? {_token(END_THINK, control_tokens)}")
    return [f"think: {' | '.join(begins)}", f"thoughts: {' | '.join(ends)}", THOUGHT]


def _token(name: str, control_tokens: Mapping[str, int]) -> str:
    """A control token, or where the tokenizer has none of that name, its letters."""
    return f"<[{control_tokens[name]}]>" if name in control_tokens else json.dumps(name)


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    given = tool.get("parameters") or NO_PARAMETERS
    return read_schema({"type": "object", **given})


def _choice(given: str | None, names: Sequence[str]) -> str:
    choice = "auto" if given is None else given
    if choice not in (*CHOICES, *names):
        raise GrammarError(
            f"tool_choice is {shortened(choice)}, and no tool of that name is offered.",
            hint=f"It is one of {', '.join(CHOICES)}, or the name of a tool.",
        )
    if choice not in ("auto", "none") and not names:
        raise GrammarError("tool_choice asks for a call, and no tools are offered.")
    return choice


def _checked(name: str, text: Any, most: int) -> str:
    """An expression or grammar within the limits."""
    if not isinstance(text, str) or not text:
        raise GrammarError(f"{name} is {shortened(text)}; it must be a text.")
    check_expression(name, text, most)
    return text


def _inside_slashes(regex: str) -> str:
    """An expression as it is written between slashes on one line."""
    known = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return re.sub(r"(?s)\\.|/|\n", lambda found: known.get(found[0], found[0]), regex)
