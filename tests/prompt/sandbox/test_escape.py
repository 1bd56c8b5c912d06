"""Marks in text from outside: where they go, against a plain reading of the rule."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from phimlx.prompt.sandbox.escape import ControlTokenEscaper

MARK = "\U00012000"
TOKENS = ("<|end|>", "<|endoftext|>", "<s>", "</s>", "|", "abab")
texts = st.lists(st.sampled_from([*TOKENS, *"<|end>/sab ", "\n", "é"]), max_size=8).map("".join)


@given(texts, st.booleans())
@settings(max_examples=200, deadline=None)
def test_marks_break_tokens_and_come_out_again(text: str, inside: bool) -> None:
    escaper = ControlTokenEscaper(TOKENS)
    escaped = escaper.escape(text, MARK, inside)
    assert escaper.unescape(escaped, MARK) == text
    assert escaped.strip(MARK).replace(MARK, "") == text.strip(MARK)
    for token in TOKENS[:4]:
        assert token not in escaped
        for size in range(1, len(token)):  # what a template may put beside the text
            assert token not in escaped.strip() + token[size:]
            assert token not in token[:size] + escaped.strip()


@given(st.lists(texts, min_size=2, max_size=4))
@settings(max_examples=200, deadline=None)
def test_texts_side_by_side_make_no_token(pieces: list[str]) -> None:
    escaper = ControlTokenEscaper(TOKENS)
    joined = "".join(escaper.escape(piece, MARK, inside=True) for piece in pieces)
    assert not any(token in joined for token in TOKENS if len(token) > 1)


def test_long_tokens_cost_what_they_take() -> None:
    tokens = [f"<{index}{'x' * 1000}>" for index in range(20)]
    tracemalloc.start()
    try:
        escaped = ControlTokenEscaper(tokens).escape("<7xxx", MARK)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert escaped == f"<{MARK}7xxx"
    assert peak < 10e6
