"""Answers under many schemas, judged by jsonschema, which is not ours."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from jsonschema import Draft202012Validator
from mlx.utils import tree_flatten

import phimlx
from phimlx.checkpoint.load import build_model
from phimlx.generation.options import GenerationOptions
from tests.bundled import present
from tests.everything import everything
from tests.generation.schemas import every
from tests.generation.small import CONFIG

SCHEMAS = every()
WILD = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
ENDINGS = frozenset('",:{}[]')


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Judges numbers as they are written, by decimals, and formats."""
    plain = json.loads(json.dumps(schema), parse_float=Decimal)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(plain, format_checker=Draft202012Validator.FORMAT_CHECKER)


def check(phi: phimlx.Phi, names: list[str], max_tokens: int) -> int:
    """Answer under each schema, all in one batch; the number that came to an end is returned."""
    requests = [
        phi.request(
            "Go.",
            GenerationOptions(schema=SCHEMAS[name], max_tokens=max_tokens, seed=place, **WILD),
        )
        for place, name in enumerate(names)
    ]
    for _ in phi.engine.run_each(iter(requests), batch_size=16):
        pass
    ended = 0
    for name, request in zip(names, requests, strict=True):
        reply = request.reply
        assert request.error is None, name
        if reply.finish_reason == "stop":
            value = json.loads(reply.text, parse_float=Decimal)
            errors = [error.message for error in validator(SCHEMAS[name]).iter_errors(value)]
            assert not errors, (name, reply.text, errors)
            assert reply.parsed == json.loads(reply.text)
            ended += 1
        else:
            assert (reply.finish_reason, reply.parsed) == ("length", None)
    return ended


def test_a_sample_of_them() -> None:
    phi = phimlx.load("nano", dtype="float32")
    names = random.Random(0).sample(sorted(SCHEMAS), 16)
    assert check(phi, names, 80) > 10


@everything
@pytest.mark.slow
def test_there_are_a_couple_of_hundred() -> None:
    assert len(SCHEMAS) > 200
    phi = phimlx.load("nano", dtype="float32")
    assert check(phi, sorted(SCHEMAS), 300) > 0.9 * len(SCHEMAS)


@pytest.fixture(scope="module")
def large(data: Path, tmp_path_factory: pytest.TempPathFactory) -> phimlx.Phi:
    """A random model with Phi-4-mini's tokenizer, whose strings and numbers come to an end."""
    tokenizer = present(data / "hf" / "Phi-4-mini-instruct" / "tokenizer.json")
    folder = tmp_path_factory.mktemp("large")
    config = {
        **CONFIG, "vocab_size": 200064, "eos_token_id": 199999, "tie_word_embeddings": False,
        "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").symlink_to(tokenizer)
    mx.random.seed(0)
    weights: Any = tree_flatten(build_model(config).parameters())
    arrays = {name: mx.random.normal(array.shape) * 0.1 for name, array in weights}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    phi = phimlx.load(folder)
    assert phi.tokenizer is not None
    ends = [
        token
        for token in range(199000)
        if phi.tokenizer.token_bytes(token).decode(errors="replace") in ENDINGS
    ]
    # Every hidden state has something of its own first dimension: there, what ends things gains.
    arrays["model.embed_tokens.weight"][:, 0] = 10
    arrays["lm_head.weight"][mx.array([*ends, *phi.eos]), 0] = 2.5
    arrays["model.norm.weight"] = mx.ones(32)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    return phimlx.load(folder)


@everything
@pytest.mark.slow
def test_under_the_largest_vocabulary(large: phimlx.Phi) -> None:
    assert check(large, sorted(SCHEMAS), 200) > 0.9 * len(SCHEMAS)
