"""Cases of reference logits, repeated here, and the differences found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors import safe_open

from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.generation.engine import Engine
from phimlx.generation.prefill import prefill
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.hub.resolve import ASSETS, NANO
from phimlx.models.base import CausalLM

SELF_TEST = ASSETS / "self-test"


@dataclass(frozen=True)
class Result:
    """One case, run.

    Attributes:
        difference: the largest |Δlogit| over the reference's largest |logit|; for a generated
            sequence, the share of tokens that differ.
        allowed: what `difference` may be.
        top1: how often the token of the largest logit is the reference's.
    """

    case: str
    difference: float
    allowed: float
    top1: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed  # false for NaN


def self_test() -> Iterator[tuple[str, Result]]:
    """Repeat every case of the models that come along for it: one of each architecture and layout.

    Yields:
        The model's name, and a case.
    """
    for folder in (NANO, *sorted(SELF_TEST.iterdir())):
        for result in run(folder, folder / "reference.safetensors"):
            yield folder.name, result


def run(folder: Path, reference: Path) -> Iterator[Result]:
    """Repeat every case of a reference file with the model of a folder.

    Args:
        reference: safetensors whose metadata `cases` lists what was run (JSON), made by
            `scripts/goldens/model_goldens.py` or `mm_goldens.py` with transformers.
    """
    with safe_open(str(reference), framework="mlx") as opened:
        cases = json.loads(opened.metadata()["cases"])
    arrays = mx.load(str(reference))
    assert isinstance(arrays, dict)
    yield from repeat(folder, cases, arrays)


def repeat(
    folder: Path, cases: Iterable[dict[str, Any]], arrays: dict[str, mx.array]
) -> Iterator[Result]:
    """Repeat cases whose arrays are at hand; a case names them."""
    models: dict[str, CausalLM] = {}
    for case in cases:
        form = json.dumps([case["dtype"], case["bits"]])
        if form not in models:
            models = {form: _model(folder, case["dtype"], case["bits"])}
        yield RUNS[case["run"]](models[form], case, arrays)


def _model(folder: Path, dtype: str, bits: int | None) -> CausalLM:
    model = load_model(Checkpoint(folder), DTYPES[dtype])
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    return model


def _pass(model: CausalLM, case: dict[str, Any], arrays: dict[str, mx.array]) -> Result:
    """All tokens at once, or in chunks of a known total."""
    ids = arrays[case["input_ids"]][None].astype(mx.int32)  # [1, length]
    chunk = case.get("chunk")
    if chunk is None:
        hidden = model.hidden_states(ids)
    else:
        cache = model.make_cache(expected_length=ids.shape[1])
        hidden = mx.concatenate(list(prefill(model, np.array(ids), cache, size=chunk)), axis=1)
    return _compare(case, model.head(hidden[0, arrays[case["positions"]]]), arrays[case["logits"]])


def _media(model: CausalLM, case: dict[str, Any], arrays: dict[str, mx.array]) -> Result:
    """Repeat a prompt with media, or several, in one pass; all positions or those named."""
    media: dict[str, Any] = {name: arrays[stored] for name, stored in case["media"].items()}
    mask = arrays[case["mask"]] if case.get("mask") else None
    logits = model(arrays[case["input_ids"]].astype(mx.int32), attention_mask=mask, **media)
    if case.get("positions"):
        logits = logits[:, arrays[case["positions"]]]
    expected = arrays[case["logits"]]
    return _compare(case, logits.reshape(expected.shape), expected)


def _batch(model: CausalLM, case: dict[str, Any], arrays: dict[str, mx.array]) -> Result:
    """Rows of different lengths in one pass, padded on the side that the case names."""
    rows = [arrays[name].astype(mx.int32) for name in case["rows"]]
    longest = max(row.size for row in rows)
    ids, masks, found = [], [], []
    for row in rows:
        padding = (longest - row.size, 0) if case["side"] == "left" else (0, longest - row.size)
        ids.append(mx.pad(row, padding))
        masks.append(mx.pad(mx.ones_like(row), padding))
    hidden = model.hidden_states(mx.stack(ids), attention_mask=mx.stack(masks))
    for index, row in enumerate(rows):
        last = longest - 1 if case["side"] == "left" else row.size - 1
        found.append(model.head(hidden[index, last]))
    return _compare(case, mx.stack(found), arrays[case["logits"]])


def _generate(model: CausalLM, case: dict[str, Any], arrays: dict[str, mx.array]) -> Result:
    """Greedy decoding, through the engine that every command uses."""
    prompt = [int(token) for token in arrays[case["prompt"]]]
    expected = [int(token) for token in arrays[case["tokens"]]]
    media = case.get("prepared")  # as the engine takes it, its places in the prompt
    request = Request(prompt, Sampler(Sampling(), seed=0), len(expected), media=media)
    Engine(model).run_all([request])
    tokens = request.reply.tokens
    same = sum(a == b for a, b in zip(tokens, expected, strict=True)) / len(expected)
    return Result(case["name"], 1 - same, case["allowed"], same)


def _compare(case: dict[str, Any], logits: mx.array, expected: mx.array) -> Result:
    logits, expected = logits.astype(mx.float32), expected.astype(mx.float32)
    difference = mx.abs(logits - expected).max() / mx.abs(expected).max()
    same = (mx.argmax(logits, axis=-1) == mx.argmax(expected, axis=-1)).astype(mx.float32)
    return Result(case["name"], float(difference), case["allowed"], float(same.mean()))


RUNS = {"pass": _pass, "media": _media, "batch": _batch, "generate": _generate}
