"""Compiles grammars for one tokenizer, by llguidance."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from phimlx.errors import GrammarError, clipped
from phimlx.generation.grammar.constraint import Constraint
from phimlx.generation.grammar.limits import COMPILE_SECONDS, PARSER_LIMITS, STACK_BYTES
from phimlx.generation.grammar.reply_form import Reasoning, ReplyForm
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT = 32  # grammars that stay compiled
STACK_LOCK = threading.Lock()  # the size of new threads' stacks is the whole process's
UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.*)\]")


class GrammarCompiler:
    """Compiles grammars to constraints.

    The tokenizer's form for llguidance takes about a second to make at 200,000 tokens: it is made
    when the first grammar is compiled. A grammar that comes again is not compiled again.

    Args:
        tokenizer: whose bytes the grammars are about.
        vocab_size: of the model, whose logits may have places beyond the tokenizer's tokens.
        stop_tokens: that end a reply.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_tokens: Collection[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = frozenset(token for token in stop_tokens if token < vocab_size)
        self._lock = threading.Lock()
        self._form: LLTokenizer | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()

    def hold(self, form: ReplyForm, reasoning: Reasoning, said: str = "") -> Constraint:
        """Make the constraint of one reply that has a form.

        Args:
            reasoning: whether the reply may begin with it.
            said: what the reply begins with, given in the prompt.

        Raises:
            GrammarError: as `compile`, and where the reply cannot begin so.
        """
        constraint = self.compile(form.source(reasoning, self._tokenizer.control_tokens))
        constraint.advance(self._tokenizer.encode(said, at_start=False))
        if constraint.error is not None:
            raise GrammarError(
                "The reply that is to be continued does not begin as its grammar has it.",
                hint="Begin it otherwise, or leave its beginning out.",
            )
        return constraint

    def compile(self, grammar: str) -> Constraint:
        """Make the constraint of one reply.

        Args:
            grammar: llguidance's JSON form of one or more grammars.

        Raises:
            GrammarError: where it cannot be held, or takes more than its limits.
        """
        with self._lock:
            if self._form is None:
                self._form = self._make_form()
            matcher = self._matchers.get(grammar)
        if matcher is None:
            matcher = compile_grammar(self._form, grammar)
        with self._lock:
            self._matchers[grammar] = matcher
            self._matchers.move_to_end(grammar)
            if len(self._matchers) > KEPT:
                self._matchers.popitem(last=False)
            return Constraint(matcher.deep_copy(), self._stop_tokens)

    def _make_form(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        if not self._stop_tokens:
            raise GrammarError(
                "The model has no token that ends a reply, so no reply can be held to a grammar.",
                hint="Name one as eos_token_id in the model's config.json.",
            )
        return LLTokenizer(
            TokenizerWrapper(_Bytes(self._tokenizer, self._vocab_size, self._stop_tokens)),
            eos_token=sorted(self._stop_tokens),
            slices=LLTokenizer.json_slices(),
        )


def compile_grammar(form: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar on a thread, whose stack is large enough for any, within a time.

    Raises:
        GrammarError: where it cannot be held, or takes more than its limits.
    """
    from llguidance import LLMatcher, LLParserLimits

    made: list[LLMatcher] = []

    def make() -> None:
        limits = LLParserLimits(**PARSER_LIMITS)
        matcher = LLMatcher(form, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        made.append(matcher)

    with STACK_LOCK:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=make, name="grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join(COMPILE_SECONDS)
    if not made:
        raise GrammarError(
            f"A reply cannot be held to this: it takes more than {COMPILE_SECONDS:g} seconds to "
            "compile.",
            hint="Make the schema or grammar simpler.",
        )
    (matcher,) = made
    if matcher.get_error().startswith("NoExtension"):
        raise GrammarError("A reply cannot be held to this: no text satisfies it.")
    if matcher.is_error():
        raise _explained(matcher.get_error())
    return matcher


class _Bytes:
    """A tokenizer as llguidance wants it: the bytes of each token, and which are control tokens."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(stop_tokens)
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        control = tokenizer.control_tokens.values()
        self.special_token_ids = sorted({t for t in control if t < vocab_size} | {*stop_tokens})

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"), at_start=False)


def _explained(message: str) -> GrammarError:
    """What llguidance says of a grammar, as an error."""
    named: Any = UNSUPPORTED.search(message)
    if named:
        keys = named[1].replace('"', "")
        return GrammarError(
            f"The schema has keywords that a reply cannot be held to: {keys}.",
            hint="Leave them out, and check the reply for them.",
        )
    first = message.strip().splitlines()[0] if message.strip() else "it cannot be compiled"
    return GrammarError(f"A reply cannot be held to this: {clipped(first.rstrip('.'))}.")
