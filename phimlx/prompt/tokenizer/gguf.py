"""The tokenizer of a GGUF file -> tokenizer.json and tokenizer_config.json, with the same ids.

A GGUF file names the way in which text is split, and says nothing of the white space that control
tokens swallow: both are known of the published tokenizers.
Source: llama.cpp, src/llama-vocab.cpp and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from phimlx.errors import TokenizerError, shortened
from phimlx.prompt.tokenizer.bpe import SENTENCEPIECE, SPACE, STRIP

ELSEWHERE = "Take the tokenizer from the original model: --tokenizer FOLDER_OR_ID"
# Characters of SentencePiece's tokens, of one and of all; Phi-3's have at most 16 and 190,000.
LONGEST, MOST = 512, 1 << 22

# How text is split before it is encoded: llama.cpp's name, and the expression of tokenizer.json.
SPLITS = {
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "dbrx": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
GPT2 = "gpt-2"  # splits as the ByteLevel step of tokenizer.json does by itself
SAME = {"phi-2": GPT2, "smaug-bpe": "dbrx"}

# Names under which llama.cpp ends a reply, whatever the file calls its end of text.
# Source: llama-vocab.cpp, "maintain a list of tokens that cause end-of-generation".
ENDS = ("<|end|>", "<|im_end|>", "<|endoftext|>")


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Strips:
    """White space that published control tokens swallow, on either side, by their spelling."""

    pattern: str
    lstrip: bool
    rstrip: bool
    special: bool = True


# Of the tokenizers that have a token of this name.
PUBLISHED = {
    # microsoft/phi-4, Phi-4-reasoning
    "<|im_sep|>": (
        Strips(r"<\|(dummy_\d+|im_\w+|fim_\w+|endoftext|endofprompt)\|>|</?think>", True, True),
    ),
    # microsoft/Phi-3-mini-4k-instruct
    "<|placeholder1|>": (
        Strips(r"</s>", False, True, special=False),
        Strips(r"<\|(assistant|placeholder\d+|system|end|user)\|>", False, True),
    ),
    # microsoft/Phi-4-mini-instruct
    "<|tool_call|>": (
        Strips(r"<\|(assistant|end|user|system|tag)\|>", False, True),
        Strips(r"<\|/?tool(_call|_response)?\|>", False, True, special=False),
    ),
}


@dataclass(frozen=True)
class RestoredTokenizer:
    """A tokenizer as files of a model folder hold it.

    Attributes:
        tokenizer, settings: tokenizer.json, and tokenizer_config.json without a template.
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]


def restore_tokenizer(
    values: Mapping[str, Any], vocab_size: int, default_split: str | None = None
) -> RestoredTokenizer:
    """Make the files of the tokenizer that a GGUF file holds.

    Args:
        values: the file's settings `tokenizer.ggml.*`, without that prefix.
        vocab_size: rows of the model's embedding.
        default_split: where the file, as older ones, does not name how text is split.

    Raises:
        TokenizerError: where there is none, or one that cannot be told exactly.
    """
    kind = values.get("model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"The file's tokenizer is of the kind {shortened(kind)}, and gpt2 and llama are read.",
            hint=ELSEWHERE,
        )
    tokens, types = _tokens(values, vocab_size)
    added = _added_tokens(tokens, types)
    kept = {
        token: index
        for index, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ != TokenType.UNUSED
    }
    if len(kept) < sum(type_ != TokenType.UNUSED for type_ in types):
        raise TokenizerError("The file's tokenizer has a token twice.", hint=ELSEWHERE)
    special = {
        name: tokens[index]
        for name in ("bos", "eos", "unknown", "padding")
        if (index := _special_id(values, name, tokens)) is not None
    }
    form = (
        _byte_level(values, kept, default_split)
        if kind == "gpt2"
        else _sentencepiece(values, tokens, types, kept, special)
    )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _post_processor(values, kind, special, kept),
        **form,
    }
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    settings = {
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{named[name]}_token": token for name, token in special.items()},
    }
    return RestoredTokenizer(tokenizer, settings)


def find_ends(values: Mapping[str, Any]) -> list[int]:
    """List the ids of the tokens that end a reply, as llama.cpp does.

    Args:
        values: as in `restore_tokenizer`.
    """
    tokens = values.get("tokens")
    tokens = tokens if isinstance(tokens, list) else []
    ends = [_special_id(values, name, tokens) for name in ("eos", "eot")]
    ends += [tokens.index(name) for name in ENDS if name in tokens]
    return list(dict.fromkeys(end for end in ends if end is not None))


def _tokens(values: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id, and what each is."""
    tokens = _list(values, "tokens")
    if not tokens or len(tokens) > vocab_size:
        raise TokenizerError(
            f"The file's tokenizer has {len(tokens)} tokens, and its model {vocab_size}.",
            hint=ELSEWHERE,
        )
    types: list[int] = [TokenType.NORMAL] * len(tokens)
    if "token_type" in values:
        types = _column(values, "token_type", len(tokens))
    for index, token in enumerate(tokens):
        if token == f"[PAD{index}]":  # older files call these user-defined
            types[index] = TokenType.UNUSED
    return tokens, types


def _list(values: Mapping[str, Any], name: str) -> list[str]:
    found = values.get(name)
    if not isinstance(found, list):
        raise TokenizerError(f"The file's tokenizer has no list of {name}.", hint=ELSEWHERE)
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        raise TokenizerError(
            f"The file's tokenizer has {name} that are not UTF-8 text.", hint=ELSEWHERE
        ) from None
    return found


def _column(values: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """A list with a number for each token."""
    found = values.get(name)
    if not isinstance(found, np.ndarray) or len(found) != count:
        raise TokenizerError(
            f"The file's tokenizer has no {name} for each of its {count} tokens.", hint=ELSEWHERE
        )
    numbers: list[Any] = found.tolist()
    return numbers


def _special_id(values: Mapping[str, Any], name: str, tokens: Sequence[str]) -> int | None:
    """The id of a token by what it is for; None where there is none."""
    found = values.get(f"{name}_token_id")
    is_id = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(tokens)
    return found if is_id else None


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Entries of `added_tokens`, in the order of their ids."""
    rules = next((rules for mark, rules in PUBLISHED.items() if mark in tokens), ())
    added = []
    for index, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ not in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN) or not token:
            continue
        is_special = type_ != TokenType.USER_DEFINED
        plain = Strips("", False, False, is_special)
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, token)), plain)
        added.append(
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": rule.lstrip,
                "rstrip": rule.rstrip,
                "normalized": not is_special and rule is plain,
                "special": rule.special,
            }
        )
    return added


def _byte_level(
    values: Mapping[str, Any], vocabulary: Mapping[str, int], default_split: str | None
) -> dict[str, Any]:
    """Parts of tokenizer.json that are byte-level BPE's."""
    split = values.get("pre", default_split)
    split = SAME.get(split, split) if isinstance(split, str) else None
    if split != GPT2 and split not in SPLITS:
        known = ", ".join([*SPLITS, GPT2, *SAME])
        raise TokenizerError(
            f"The file's tokenizer splits text as {shortened(values.get('pre'))}; known of the "
            f"Phi family are {known}.",
            hint=ELSEWHERE,
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer: dict[str, Any] = {**byte_level, "use_regex": True}
    if split != GPT2:
        pattern = {"Regex": SPLITS[split]}
        steps = [
            {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True},
            {**byte_level, "use_regex": False},
        ]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    merges = []
    for pair in _list(values, "merges"):
        left, space, right = pair.partition(" ")
        if (
            not space
            or " " in right
            or any(part not in vocabulary for part in (left, right, left + right))
        ):
            raise TokenizerError(
                f"The file's tokenizer merges {shortened(pair)}, which are no two of its tokens.",
                hint=ELSEWHERE,
            )
        merges.append([left, right])
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": _model(vocabulary, merges),
    }


def _sentencepiece(
    values: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    vocabulary: Mapping[str, int],
    special: Mapping[str, str],
) -> dict[str, Any]:
    """Parts of tokenizer.json that are SentencePiece's BPE's, as Phi-3's was published."""
    scores = _column(values, "scores", len(tokens))
    if not np.isfinite(scores).all():
        raise TokenizerError("The file's tokenizer has scores that are not finite.", hint=ELSEWHERE)
    ordinary = {
        token: score
        for token, score, type_ in zip(tokens, scores, types, strict=True)
        if type_ == TokenType.NORMAL
    }
    prefix = values.get("add_space_prefix", True) is not False
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}, spaces]
    steps = [*SENTENCEPIECE, STRIP] if prefix else SENTENCEPIECE
    model = _model(vocabulary, _merges(ordinary, vocabulary))
    model |= {"unk_token": special.get("unknown"), "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if prefix else spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }


def _merges(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Merges that make the tokens of the highest score first.

    Source: transformers, `convert_slow_tokenizer.py`, `generate_merges`.
    """
    total = sum(map(len, scores))
    if total > MOST:
        raise TokenizerError(
            f"The file's tokenizer has tokens of {total} characters in all; at most {MOST} are "
            "read.",
            hint=ELSEWHERE,
        )
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in scores.items():
        if len(token) > LONGEST:
            raise TokenizerError(
                f"The file's tokenizer has a token of {len(token)} characters; at most {LONGEST} "
                "are read.",
                hint=ELSEWHERE,
            )
        local = []
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                local.append((vocabulary[left], vocabulary[right], left, right))
        found += [(score, len(left), len(right), left, right) for *_, left, right in sorted(local)]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for *_, left, right in found]


def _model(vocabulary: Mapping[str, int], merges: Sequence[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": list(merges),
    }


def _post_processor(
    values: Mapping[str, Any], kind: str, special: Mapping[str, str], vocabulary: Mapping[str, int]
) -> dict[str, Any] | None:
    """What puts the first token in front of a text; None where nothing does."""
    bos = special.get("bos")
    if (
        bos is None
        or bos not in vocabulary
        or values.get("add_bos_token", kind == "llama") is not True
    ):
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": type_}} for type_, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], {"SpecialToken": {"id": bos, "type_id": 1}}, texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}},
    }
