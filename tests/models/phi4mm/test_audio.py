"""Features of audio clips against transformers', single, folded and padded together.

The goldens are made by `scripts/goldens/encoder_goldens.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from phimlx.errors import ConfigError, MediaError
from phimlx.models.phi4mm import conformer
from phimlx.models.phi4mm.audio import AudioConfig, AudioEmbedding, audio_layouts
from phimlx.models.phi4mm.conformer import audio_tokens

GOLDEN = Path(__file__).parents[2] / "goldens" / "encoders" / "audio.safetensors"
ARRAYS, METADATA = mx.load(str(GOLDEN), return_metadata=True)
CONFIG = json.loads(METADATA["config"])
CASES = json.loads(METADATA["cases"])


def embedding(dtype: mx.Dtype = mx.float32) -> AudioEmbedding:
    module = AudioEmbedding(AudioConfig.from_dict(CONFIG), CONFIG["hidden_size"])
    module.load_weights(
        [
            (name.removeprefix("weights."), array.astype(dtype))
            for name, array in ARRAYS.items()
            if name.startswith("weights.")
        ]
    )
    return module


def encode(
    module: AudioEmbedding, frames: mx.array, sizes: mx.array, mask: mx.array | None
) -> list[mx.array]:
    known = None if mask is None else np.array(mask)
    return module.encode(frames, audio_layouts(frames.shape, np.array(sizes), known))


def clips(frames: list[int], masked: bool) -> tuple[mx.array, mx.array, mx.array | None]:
    """The arguments of `encode` for clips of so many frames."""
    piece = np.array(ARRAYS["piece"]).astype(np.float32) / 32
    arrays = np.zeros((len(frames), max(frames), piece.shape[1]), np.float32)
    mask = np.zeros(arrays.shape[:2], np.int64)
    for i, count in enumerate(frames):
        arrays[i, :count] = np.resize(piece, (count, piece.shape[1]))
        mask[i, :count] = 1
    sizes = [-(-count // 8) for count in frames]
    return mx.array(arrays), mx.array(sizes), mx.array(mask) if masked else None


def golden_clips(case: str) -> tuple[mx.array, mx.array, mx.array | None]:
    frames = np.array(ARRAYS[f"{case}.frames"]).tolist()
    return clips(frames, masked=len(frames) > 1 or case == "masked_alone")


def watched(count: int) -> list[int]:
    if count <= 64:
        return list(range(count))
    spread = np.linspace(0, count - 1, 40)
    rows = np.concatenate([spread, np.arange(495, min(505, count))]).astype(int)
    return np.unique(rows).tolist()


def difference(found: mx.array, expected: mx.array) -> float:
    """Relative to the largest expected value."""
    assert found.shape == expected.shape
    largest = mx.abs(expected).max()
    return float((mx.abs(found.astype(mx.float32) - expected).max() / largest).item())


@pytest.mark.parametrize("case", CASES)
def test_features_equal_the_reference(case: str) -> None:
    arguments = golden_clips(case)
    features = encode(embedding(), *arguments)
    sizes = np.array(ARRAYS[f"{case}.audio_embed_sizes"]).tolist()
    assert [len(clip) for clip in features] == sizes
    found = mx.concatenate(features)
    rows = mx.array(watched(len(found)))
    assert difference(found[rows], ARRAYS[f"{case}.features"]) < 1e-5


@pytest.mark.parametrize("mode", ["speech", "vision"])
def test_projections_equal_the_reference(mode: Literal["speech", "vision"]) -> None:
    found = embedding().project(ARRAYS["projected.features"], mode)
    assert difference(found, ARRAYS[f"projected.{mode}"]) < 1e-5


@pytest.mark.parametrize(("dtype", "allowed"), [(mx.bfloat16, 0.03), (mx.float16, 0.005)])
def test_half_precision_is_near(dtype: mx.Dtype, allowed: float) -> None:
    module = embedding(dtype)
    features = encode(module, *golden_clips("long_and_short"))
    assert all(clip.dtype == dtype for clip in features)
    found = mx.concatenate(features)
    rows = mx.array(watched(len(found)))
    assert difference(found[rows], ARRAYS["long_and_short.features"]) < allowed


@pytest.mark.parametrize("block", [1, 3, 500])
def test_subsampling_in_blocks_equals_the_whole(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    arguments = clips([301], masked=False)
    expected = encode(embedding(), *arguments)[0]
    monkeypatch.setattr(conformer, "BLOCK_TOKENS", block)
    assert difference(encode(embedding(), *arguments)[0], expected) < 1e-6


def test_a_clip_is_masked_from_its_neighbours() -> None:
    """What stands in one clip changes no other, nor does how far the other pads it."""
    module = embedding()
    short = encode(module, *clips([301, 150], masked=True))[1]
    arrays, sizes, mask = clips([301, 150], masked=True)
    loud = mx.concatenate([arrays[:1] * 3, arrays[1:]])
    assert difference(encode(module, loud, sizes, mask)[1], short) == 0
    assert difference(encode(module, *clips([4301, 150], masked=True))[1], short) < 1e-6


def test_the_zeros_of_a_single_folded_clip_are_attended_to() -> None:
    """As the original does: a mask, which a batch brings, changes the last chunk of a clip."""
    module = embedding()
    single = encode(module, *clips([4301], masked=False))[0]
    masked = encode(module, *clips([4301], masked=True))[0]
    assert difference(single[:500], masked[:500]) < 1e-6
    assert difference(single[500:], masked[500:]) > 1e-3


def test_parameters_carry_the_published_names(data: Path) -> None:
    folder = data / "tiny" / "tiny-phi4mm-remote"
    config = json.loads((folder / "config.json").read_text())
    prefix = "model.embed_tokens_extend.audio_embed."
    weights: Any = mx.load(str(folder / "model.safetensors"))
    stored = {
        name.removeprefix(prefix): array.shape
        for name, array in weights.items()
        if name.startswith(prefix)
    }
    module = AudioEmbedding(AudioConfig.from_dict(config), config["hidden_size"])
    parameters: Any = tree_flatten(module.parameters())
    assert {name: array.shape for name, array in parameters} == stored


def test_token_counts() -> None:
    assert [audio_tokens(frames) for frames in (1, 8, 9, 4000, 4001)] == [1, 1, 2, 500, 501]


def test_published_shape(data: Path) -> None:
    folder = data / "hf" / "Phi-4-multimodal-instruct"
    config = AudioConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert asdict(config) == {
        "attention_dim": 1024,
        "attention_heads": 16,
        "linear_units": 1536,
        "num_blocks": 24,
        "input_size": 80,
        "kernel_size": 3,
        "conv_channels": 1024,
        "t5_bias_max_distance": 500,
    }


PLACE = "config.json: audio_processor.config."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": None}, PLACE + "num_blocks is missing."),
        ({"num_blocks": 0}, PLACE + "num_blocks is 0, not a whole number from 1 to 65536."),
        (
            {"activation": "relu"},
            PLACE + "activation is 'relu', but Phi-4-multimodal has 'swish' here.",
        ),
        (
            {"time_reduction": 4},
            PLACE + "time_reduction is 4, but Phi-4-multimodal has 8 here.",
        ),
        (
            {"relative_attention_bias_args": {"type": "alibi"}},
            PLACE + "relative_attention_bias_args.type is 'alibi', but Phi-4-multimodal has 't5' "
            "here.",
        ),
        ({"attention_heads": 5}, PLACE + "attention_dim (24) is not a multiple of 5."),
        (
            {"ext_pw_out_channel": 7},
            PLACE + "ext_pw_out_channel is 7, but Phi-4-multimodal has 24 here.",
        ),
        ({"nemo_conv_settings": None}, PLACE + "nemo_conv_settings is missing."),
        ({"nemo_conv_settings": 3}, PLACE + "nemo_conv_settings is 3, not a table of values."),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    settings = {**CONFIG["audio_processor"]["config"], **changes}
    with pytest.raises(ConfigError) as error:
        AudioConfig.from_dict({"audio_processor": {"config": settings}})
    assert str(error.value) == message


def test_config_without_audio() -> None:
    with pytest.raises(ConfigError) as error:
        AudioConfig.from_dict({})
    assert str(error.value) == "config.json: audio_processor is missing."


def test_more_tokens_than_frames() -> None:
    arrays, _, mask = clips([301, 150], masked=True)
    with pytest.raises(MediaError) as error:
        encode(embedding(), arrays, mx.array([38, 38]), mask)
    assert str(error.value) == (
        "Audio clip 2 has 19 tokens in 150 frames, but audio_embed_sizes has 38."
    )
    assert error.value.hint == "The arrays must come from one call of the processor."
