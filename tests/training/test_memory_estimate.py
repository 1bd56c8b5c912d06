"""The forecast against what MLX says that a step took, and what is advised where it is too much."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.checkpoint.load import build_model
from phimlx.hub.resolve import NANO
from phimlx.models.multimodal import MultimodalLM
from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.batches import Batches, Example, Task
from phimlx.training.data.media import MediaItem, MediaReader
from phimlx.training.features import EncodedMedia
from phimlx.training.memory_estimate import Drawing, LargestBatch, estimate_memory, remedies
from phimlx.training.policy import Answering
from phimlx.training.reference import evaluating
from phimlx.training.run.media import media_plan
from phimlx.training.schedule import make_optimizer
from phimlx.training.settings import TrainSettings
from phimlx.training.step import TrainingStep
from phimlx.training.trainable import attach

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}
MINI = {
    **CONFIG,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
}
GB = 1_000_000_000

# Changes of the configuration, of the settings, bits of the weights, length of the rows.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None, int]] = {
    "lora": ({}, {}, None, 128),
    "lora, checkpointed, long rows": ({"vocab_size": 500}, {"grad_checkpoint": True}, None, 256),
    "lora at 4 bits": ({"vocab_size": 500, "num_hidden_layers": 4}, {}, 4, 96),
    "all weights": ({"vocab_size": 2000}, {"fine_tune_type": "full"}, None, 64),
}


def weights_of(model: nn.Module) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_within_15_percent_of_the_measured_peak(name: str) -> None:
    changes, options, bits, length = RUNS[name]
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()
    config = Phi3Config.from_dict({**CONFIG, **changes})
    settings = TrainSettings(**options)
    mx.random.seed(0)
    model = Phi3ForCausalLM(config)
    if bits:
        nn.quantize(model, 64, bits)
    mx.eval(model.parameters())
    random = np.random.default_rng(0)
    examples = [
        Example(
            random.integers(0, config.vocab_size, length + 1).astype(np.int32),
            np.ones(length + 1, bool),
        )
        for _ in range(4)
    ]
    (batch,) = Batches(examples, 4).epoch(0)
    expected = estimate_memory(config, weights_of(model), settings, LargestBatch.of(batch), 4).total

    attach(model, settings)
    step = TrainingStep(
        model, make_optimizer(settings, 3), clip=1.0, checkpointing=settings.grad_checkpoint
    )
    mx.reset_peak_memory()
    for number in range(1, 4):
        step(number, [batch])
    measured = mx.get_peak_memory() - others
    assert expected == pytest.approx(measured, rel=0.15)


MM_CHANGES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
    "vision_lora": {"r": 32, "lora_alpha": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("vision-adapter",), ("vision-adapter", "projector"), ("new",)])
def test_pictures_are_within_15_percent_too(parts: tuple[Any, ...], data: Path) -> None:
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()
    given = json.loads((data / "tiny" / "tiny-phi4mm-remote" / "config.json").read_text())
    model = build_model({**given, **MM_CHANGES})
    mx.eval(model.parameters())
    settings = TrainSettings(train=parts)
    random = np.random.default_rng(0)
    examples = []
    for number in range(4):
        tokens = random.integers(0, 400, 301).astype(np.int32)
        tokens[5:261] = given["image_token_id"]
        item = MediaItem("image", bytes([number]), 256, None, begin=5)
        supervised = np.arange(301) > 280
        examples.append(Example(tokens, supervised, media=(item,)))
    (batch,) = Batches(examples, 4).epoch(0)
    plan = replace(media_plan(model, settings, examples, 4), encoding=0)
    weights = weights_of(model)
    load = LargestBatch.of(batch)
    expected = estimate_memory(model.config, weights, settings, load, 4, plan).total
    attach(model, settings, {"image"})
    features = mx.zeros((256, 48))
    mx.eval(features)
    step = TrainingStep(
        model, make_optimizer(settings, 3), clip=1.0, features=lambda item: features
    )
    mx.reset_peak_memory()
    for number in range(1, 4):
        step(number, [batch])
    measured = mx.get_peak_memory() - others
    assert expected == pytest.approx(measured, rel=0.15)


WIDE_VISION = {"hidden_size": 192, "intermediate_size": 720}
WIDE_AUDIO = {
    "attention_dim": 192,
    "ext_pw_out_channel": 192,
    "depthwise_seperable_out_channel": 192,
    "attention_heads": 8,
    "linear_units": 288,
    "nemo_conv_settings": {"conv_channels": 192},
}


class Blank:
    """Opens a picture of one crop, or a sound, of which nothing is to be seen or heard."""

    def open(self, item: MediaItem) -> dict[str, Any]:
        if item.kind == "image":
            pixels = np.zeros((1, 2, 3, 448, 448), np.float32)
            return {"input_image_embeds": pixels, "image_sizes": np.array([[448, 448]])}
        frames = np.zeros((1, 8 * item.tokens, 80), np.float32)
        return {"input_audio_embeds": frames, "audio_embed_sizes": np.array([item.tokens])}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "tokens"), [("image", 545), ("audio", 130)])
def test_encoders_are_within_15_percent_too(
    kind: str, tokens: int, dtype: mx.Dtype, data: Path
) -> None:
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()
    given = json.loads((data / "tiny" / "tiny-phi4mm-remote" / "config.json").read_text())
    given["vision_config"] |= WIDE_VISION
    given["audio_processor"]["config"] |= WIDE_AUDIO
    model = build_model({**given, "vocab_size": 520})
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    settings = TrainSettings(grad_checkpoint=True, num_layers=1)
    row = np.full(tokens + 3, 7, np.int32)
    row[1 : tokens + 1] = given[f"{kind}_token_id"]
    item = MediaItem(kind, b"", tokens, None, begin=1)
    example = Example(row, np.arange(tokens + 3) > tokens, media=(item,))
    (batch,) = Batches([example], 1).epoch(0)
    plan = media_plan(model, settings, [example], dtype.size)
    weights, load = weights_of(model), LargestBatch.of(batch)
    expected, without = (
        estimate_memory(model.config, weights, settings, load, dtype.size, each).total
        for each in (plan, replace(plan, encoding=0))
    )
    attach(model, settings, {kind})
    assert isinstance(model, MultimodalLM)
    features = EncodedMedia(model, cast(MediaReader, Blank()))
    step = TrainingStep(model, make_optimizer(settings, 1), checkpointing=True, features=features)
    mx.reset_peak_memory()
    step(1, [batch])
    measured = mx.get_peak_memory() - others
    assert expected == pytest.approx(measured, rel=0.15)
    assert without < 0.8 * measured


def test_the_mildest_remedy_that_fits_is_named() -> None:
    config, settings = Phi3Config.from_dict(MINI), TrainSettings()
    load = LargestBatch(4, 2048, 8192)

    def first(memory: int) -> str | None:
        found = next(remedies(config, 2 * GB, settings, load, 2, memory), None)
        return None if found is None else found[0]

    needed = [
        estimate_memory(config, 2 * GB, TrainSettings(grad_checkpoint=True), each).total
        for each in (load, load.shrunk(2, 2048), load.shrunk(1, 1024))
    ]
    assert needed == sorted(needed, reverse=True)
    assert first(needed[0]) == "--grad-checkpoint"
    assert first(needed[1]) == "--grad-checkpoint --batch-size 2"
    assert first(needed[2]) == "--grad-checkpoint --batch-size 1 --max-seq-length 1024"
    assert first(2 * GB) is None


@pytest.mark.slow
def test_answers_that_are_drawn_are_within_15_percent_too() -> None:
    config = Phi3Config.from_dict({**CONFIG, "vocab_size": 500})
    mx.random.seed(0)
    model = Phi3ForCausalLM(config)
    mx.eval(model.parameters())
    settings = TrainSettings(method="grpo", batch_size=8, group_size=4, grad_checkpoint=True)
    attach(model, settings)
    random = np.random.default_rng(0)
    examples = []
    for _ in range(8):
        tokens = random.integers(10, 300, 150).astype(np.int32)
        examples.append(Example(tokens, np.zeros(150, bool), task=Task("?", None, {})))
    (batch,) = Batches(examples, 8).epoch(0)
    lengths: Any = [lambda answers: [float(each.tokens) for each in answers]]
    answering = Answering(Tokenizer.load(NANO), frozenset({-1}), lengths, 4, 12)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with evaluating(model):
        answering.draw(model, batch, 1)
    measured = mx.get_peak_memory() - before
    drawing = Drawing(8, 150, 161, 4, 64)
    assert drawing.nbytes(config, 4) == pytest.approx(measured, rel=0.15)
    largest = LargestBatch(4, 168, 128, drawing=drawing)
    forecast = estimate_memory(config, weights_of(model), settings, largest, 4)
    left = forecast.gradients + forecast.activations + forecast.working
    assert left >= drawing.nbytes(config, 4)
    text, _ = next(remedies(config, 0, settings, largest, 4, left - 1_000_000))
    assert text == "--grad-checkpoint --group-size 2"
