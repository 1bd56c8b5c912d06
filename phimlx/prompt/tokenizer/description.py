"""A tokenizer.json, looked at before the `tokenizers` library is given it.

The library trusts its file: what it cannot do ends in a panic, a long expression never ends, and an
id that no vocabulary has becomes a row of the embedding that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phimlx.errors import ConfigError, TokenizerError, shortened
from phimlx.files import read_json

HINT = "Download the model again."
MAX_ID = 1 << 24
LONGEST_PATTERN = 4000  # characters; the longest of the family has 500
MAX_GROWTH = 64  # characters that a normalizer may make of one

# Whatever the Phi family's tokenizers are made of, and its relatives'.
NORMALIZERS = ("Sequence", "Prepend", "Replace", "Strip", "NFC", "NFD", "NFKC", "NFKD", "Lowercase")
PRE_TOKENIZERS = ("Sequence", "Split", "ByteLevel", "Metaspace", "Digits", "Punctuation",
                  "Whitespace", "WhitespaceSplit")  # fmt: skip
# A repetition of what repeats, whose search may take for ever.
_NESTED = re.compile(r"\([^()]*[+*][^()]*\)[+*{]")


def read_description(path: Path) -> dict[str, Any]:
    """Read a tokenizer.json that the library may be given.

    Raises:
        TokenizerError: where it is damaged, or has parts that no tokenizer of the family has.
    """
    table = read_json(path, TokenizerError, hint=HINT)
    problem = _problem(table)
    if problem:
        raise TokenizerError(f"{path}: {problem}.", hint=HINT)
    return {**table, "truncation": None, "padding": None}  # of which none is made use


def check_ids(folder: Path, highest: int) -> None:
    """Raise TokenizerError where a token's id is beyond the vocabulary that config.json names."""
    try:
        size = read_json(folder / "config.json", missing_ok=True).get("vocab_size")
    except ConfigError:  # which whoever needs it says
        return
    if type(size) is int and highest >= size:
        raise TokenizerError(
            f"The tokenizer in {folder} has the token {highest}, but the model's vocabulary has "
            f"{size}.",
            hint="Get the tokenizer files that belong to the model into its folder.",
        )


def _problem(table: Mapping[str, Any]) -> str | None:
    """Say what is wrong, as the end of a sentence."""
    model, added = table.get("model"), table.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        return "model or added_tokens is missing"
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        named = [*vocabulary.values()]
        for token in added:
            if not isinstance(token, dict) or not isinstance(token.get("content"), str):
                return f"added_tokens holds {shortened(token)}"
            named.append(token.get("id"))
        for number in named:
            if type(number) is not int or not 0 <= number < MAX_ID:
                return f"a token has the id {shortened(number)}"
        unknown = model.get("unk_token")
        if unknown not in (None, "") and str(unknown) not in vocabulary:
            return f"unk_token is {shortened(unknown)}, which is no token"
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key) not in (None, ""):
            return f"{key} is {shortened(model[key])}, which no tokenizer of the family has"
    return _problem_of_steps(table)


def _problem_of_steps(table: Mapping[str, Any]) -> str | None:
    growth = 1
    for place, known in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS)):
        for step in _steps(table.get(place)):
            kind = step.get("type") if isinstance(step, dict) else step
            if not isinstance(kind, str) or kind not in known:
                return f"{place} is {shortened(kind)}, which no tokenizer of the family has"
            pattern = step.get("pattern")
            text = next(iter(pattern.values()), None) if isinstance(pattern, dict) else pattern
            if "pattern" in step and (not isinstance(text, str) or not text):
                return f"{place} has the pattern {shortened(text)}"
            is_regex = isinstance(pattern, dict) and "Regex" in pattern
            regex = str(text) if is_regex else ""
            if len(regex) > LONGEST_PATTERN or _NESTED.search(regex):
                return f"{place} has the pattern {shortened(text)}, which may never end"
            growth *= max(1, len(str(step.get("content", ""))))
            if growth > MAX_GROWTH:
                return f"{place} makes long texts of short ones"
    return None


def _steps(part: Any) -> Iterator[Any]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    left = [] if part is None else [part]
    while left:
        step = left.pop()
        yield step
        if isinstance(step, dict) and step.get("type") == "Sequence":
            inner = step.get("normalizers", step.get("pretokenizers"))
            left += inner if isinstance(inner, list) else [inner]
