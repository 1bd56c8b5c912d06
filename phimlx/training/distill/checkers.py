"""Checks of a teacher's answers: only those that pass all of them are learned.

Rejection sampling, as in STaR (arXiv 2203.14465) and RFT (arXiv 2308.01825): of several answers to
a question those that can be shown to be right are kept.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from phimlx.errors import TrainingError
from phimlx.generation.grammar.compiler import GrammarCompiler
from phimlx.generation.grammar.reply_form import ReplyForm
from phimlx.generation.options import GenerationOptions
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.distill.questions import Question

Reply = Mapping[str, Any]
"""As `phimlx.generation.reply.Reply.as_object` makes it."""

Checker = Callable[[Question, Reply], str | None]
"""Says why an answer is not learned; None where it is."""

PUNCTUATION = frozenset(string.punctuation)
PLACES = re.compile(r"\{(question|answer|expected)\}")
JUDGED = re.compile(r"yes\b", re.IGNORECASE)
VERDICT = "(yes|no)"  # what a judge may answer

JUDGE = """\
Question:
{question}

Answer:
{answer}

Is this answer correct and complete? Answer yes or no."""


def is_whole(question: Question, reply: Reply) -> str | None:
    """Reject what the limit of tokens cut, and what says nothing."""
    if reply.get("finish_reason") not in ("stop", "tool_calls"):
        return "cut off by the limit of tokens"
    if not str(reply.get("text", "")).strip() and not reply.get("tool_calls"):
        return "empty"
    return None


def is_expected(question: Question, reply: Reply) -> str | None:
    """Reject what is not the row's own answer, but for case, punctuation and articles."""
    if question.expected is None:
        return "the row has no answer to compare with"
    same = words(question.expected) == words(str(reply.get("text", "")))
    return None if same else "another answer than the row's"


def words(text: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and articles.

    Where nothing is left of it, as of an answer of signs alone, the text itself.

    Source: SQuAD (arXiv 1606.05250), section 6.1, and its evaluation script.
    """
    bare = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split() or [text.strip()]


def under_schema(schema: Mapping[str, Any]) -> Checker:
    """Reject what is not JSON, or not valid under a JSON Schema.

    Raises:
        TrainingError: where the schema is none.
    """
    from phimlx.training.json_schema import JSONSchema, NotJSONError

    held = JSONSchema(dict(schema), "The schema")

    def check(question: Question, reply: Reply) -> str | None:
        try:
            valid = held.allows(str(reply.get("text", "")))
        except NotJSONError:
            return "no JSON"
        return None if valid else "not valid under the schema"

    return check


def matching(regex: str, tokenizer: Tokenizer, vocab_size: int, stop_tokens: set[int]) -> Checker:
    """Reject what a regular expression, in the syntax of `generate --regex`, does not match as a
    whole; no expression takes more than time in proportion to the text.

    Raises:
        GrammarError: where it is none.
    """
    compiler = GrammarCompiler(tokenizer, vocab_size, stop_tokens)
    form = ReplyForm.read(GenerationOptions(regex=regex))
    assert form is not None
    source = form.source("none", {})
    compiler.compile(source)  # a fault in it is told before anything is asked

    def check(question: Question, reply: Reply) -> str | None:
        state = compiler.compile(source)
        state.advance(tokenizer.encode(str(reply.get("text", "")), at_start=False))
        may_end = state.error is None and state.allowed(vocab_size)[0][sorted(stop_tokens)].any()
        return None if may_end else "does not match the expression"

    return check


def judge_prompt(template: str, question: Question, reply: Reply) -> str:
    """Fill a judge's prompt: `{question}`, `{answer}` and `{expected}`, each as it stands."""
    parts = {
        "question": question.text,
        "answer": str(reply.get("text", "")),
        "expected": question.expected or "",
    }
    return PLACES.sub(lambda found: parts[found[1]], template)


def check_judge(template: str) -> str:
    """Return a judge's prompt; raises TrainingError where it does not show the answer."""
    if "{answer}" not in template:
        raise TrainingError(
            "The judge's prompt does not show the answer.",
            hint="Write {answer} in it, and {question} and {expected} where they help; it has to "
            "ask for yes or no.",
        )
    return template


def is_approved(verdict: Reply) -> bool:
    """Whether a judge said yes."""
    return JUDGED.match(str(verdict.get("text", "")).strip()) is not None


class Novelty:
    """Rejects an answer that the same question has had already, but for case and white space."""

    def __init__(self) -> None:
        self._seen: set[tuple[bytes, str, str]] = set()

    def __call__(self, question: Question, reply: Reply) -> str | None:
        calls = json.dumps(reply.get("tool_calls") or [], sort_keys=True)
        text = " ".join(str(reply.get("text", "")).casefold().split())
        key = question.as_json, text, calls
        if key in self._seen:
            return "the same as another"
        self._seen.add(key)
        return None
