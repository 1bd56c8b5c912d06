"""Phi-4-mini-flash-reasoning against its author's code: layers, lengths, padding, pieces, types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.errors import ConfigError, GenerationError
from phimlx.machine.memory import cache_bytes
from phimlx.models.base import CausalLM
from phimlx.models.phi4flash import scan
from phimlx.models.phi4flash.cache import KEPT
from phimlx.models.phi4flash.scan import BEGINS, CHUNK, last_state, selective_scan

EXACT = 5e-5
LENGTHS = ("len1", "len13", "len16", "len17", "len90", "len200")  # the window is 16

Oracle = dict[str, mx.array]


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    return data / "tiny" / "tiny-phi4flash"


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalLM:
    return load_model(Checkpoint(folder))


def arrays(file: Path) -> Oracle:
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return {k: v.astype(mx.int32) if v.dtype == mx.int64 else v for k, v in found.items()}


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return arrays(folder / "oracle.safetensors")


def difference(found: mx.array, expected: mx.array) -> float:
    assert found.shape == expected.shape
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def ids_of(length: int, seed: int = 0, rows: int = 1) -> mx.array:
    return mx.random.randint(0, 512, (rows, length), key=mx.random.key(seed))


def test_every_layer_is_the_references(model: CausalLM, folder: Path) -> None:
    layers = arrays(folder / "layers.safetensors")
    x, forward = model.embed(layers["input_ids"]), model.forward_pass(layers["input_ids"])
    for number, layer in enumerate(model.layers):
        x = layer(x, forward)
        assert difference(x[0], layers[f"layer{number}"]) <= EXACT, number
    assert difference(forward.shared["memory"][0], layers["memory"]) <= EXACT


@pytest.mark.parametrize("case", LENGTHS)
def test_logits_are_the_references(model: CausalLM, oracle: Oracle, case: str) -> None:
    logits = model(oracle[f"{case}.input_ids"])[0]
    assert difference(logits[oracle[f"{case}.rows"]], oracle[f"{case}.logits"]) <= EXACT


@pytest.mark.parametrize("piece", [1, 15, 16, 17, KEPT, KEPT + 1, 150])
def test_pieces_equal_the_whole(model: CausalLM, oracle: Oracle, piece: int) -> None:
    ids, cache = oracle["len200.input_ids"], model.make_cache()
    found = [model(ids[:, begin : begin + piece], cache) for begin in range(0, 200, piece)]
    logits = mx.concatenate(found, axis=1)[0]
    assert difference(logits[oracle["len200.rows"]], oracle["len200.logits"]) <= EXACT


@pytest.mark.parametrize("piece", [1, 9, 40])
def test_padded_rows_are_the_references(model: CausalLM, oracle: Oracle, piece: int) -> None:
    ids, mask = oracle["padded.input_ids"], oracle["padded.attention_mask"]
    assert difference(
        model(ids, attention_mask=mask)[:, oracle["padded.rows"]], oracle["padded.logits"]
    ) <= EXACT  # fmt: skip
    cache = model.make_cache()
    pieces = [slice(begin, begin + piece) for begin in range(0, 40, piece)]
    found = [model(ids[:, here], cache, attention_mask=mask[:, here]) for here in pieces]
    logits = mx.concatenate(found, axis=1)[:, oracle["padded.rows"]]
    assert difference(logits, oracle["padded.logits"]) <= EXACT


def test_greedy_tokens_are_the_references(model: CausalLM, oracle: Oracle) -> None:
    """Beyond the window, where the reference's own cache would lose a token."""
    cache, ids, tokens = model.make_cache(), oracle["greedy.input_ids"], []
    for _ in range(oracle["greedy.generated"].size):
        ids = mx.argmax(model(ids, cache)[:, -1:], axis=-1)
        tokens.append(ids.item())
    assert tokens == oracle["greedy.generated"].tolist()


def test_rows_padded_on_the_right_are_the_rows_alone(model: CausalLM) -> None:
    ids, lengths = ids_of(45, rows=3), (45, 20, 3)
    mask = mx.arange(45)[None] < mx.array(lengths)[:, None]
    logits = model(ids, attention_mask=mask)
    cached = model(ids, model.make_cache(), attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length])[0]
        assert difference(logits[row, :length], alone) <= EXACT
        assert difference(cached[row, :length], alone) <= EXACT


def test_what_is_not_wanted_is_not_computed(model: CausalLM) -> None:
    """The cross-decoder sees the wanted positions alone, and they are those of the whole."""
    ids = ids_of(40)
    whole = model.hidden_states(ids)
    seen: list[tuple[int, ...]] = []

    class Spy:
        def __init__(self, layer: Any) -> None:
            self.layer = layer

        def __call__(self, x: mx.array, forward: Any) -> mx.array:
            seen.append(x.shape)
            return self.layer(x, forward)

    kept = list(model.layers)
    for outputs in (1, 3, 40):
        seen.clear()
        model.model.layers = [Spy(layer) for layer in kept]
        try:
            found = model.hidden_states(ids, model.make_cache(), outputs=outputs)
        finally:
            model.model.layers = kept
        assert difference(found, whole[:, -outputs:]) <= EXACT
        # Layer 5 keeps keys and values of all, and gives on what is wanted.
        assert [shape[1] for shape in seen] == [40] * 6 + [outputs] * 2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_keeps_the_residual_stream_in_float32(
    folder: Path, model: CausalLM, dtype: mx.Dtype
) -> None:
    half = load_model(Checkpoint(folder), dtype)
    ids = ids_of(70)
    x, forward = half.embed(ids), half.forward_pass(ids)
    assert x.dtype == dtype
    for layer in half.layers:
        x = layer(x, forward)
        assert x.dtype == mx.float32
    assert half.norm(x).dtype == dtype
    limit = {mx.bfloat16: 0.2, mx.float16: 0.02}[dtype]
    assert difference(half(ids).astype(mx.float32), model(ids)) <= limit
    cache = half.make_cache()
    half(ids, cache)
    states = [cache.store.state(layer) for layer in (0, 2, 4)]  # type: ignore[attr-defined]
    assert all(state.state.dtype == mx.float32 for state in states)


def test_the_cache_is_as_large_as_forecast(model: CausalLM) -> None:
    config, cache = model.config, model.make_cache()
    for begin in range(0, 512, 64):
        model.hidden_states(ids_of(512)[:, begin : begin + 64], cache, outputs=1)
    needed = cache_bytes(config, 512, itemsize=4)
    assert needed == 512 * 2 * 4 * 8 * 4 + 2 * 16 * 2 * 4 * 8 * 4 + 3 * 128 * (16 + 3) * 4
    assert needed <= cache.nbytes < 4 * needed  # places to go back to come on top


def test_nothing_of_a_pass_is_held_but_what_is_kept(model: CausalLM) -> None:
    """Slices of what a long pass computed would hold all of it."""
    ids, cache = ids_of(3000), model.make_cache()
    mx.eval(ids, model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.eval(model.hidden_states(ids, cache, outputs=1), cache.state)
    mx.clear_cache()
    assert mx.get_active_memory() - before <= 1.2 * cache.nbytes + 3000 * 8


def test_a_row_does_not_go_on_after_padding(model: CausalLM) -> None:
    """Which no batch of ours does: a state that has seen padding is not the row's."""
    ids, cache = ids_of(10, rows=2), model.make_cache()
    model(ids, cache, attention_mask=mx.array([[1] * 10, [1] * 6 + [0] * 4]))
    with pytest.raises(GenerationError) as caught:
        model(ids[:, :1], cache)
    assert str(caught.value) == "Row 1 goes on after padding, which this model's state cannot."
    assert caught.value.hint == "Pad rows on the left."
    cache = model.make_cache()
    model(ids, cache)
    with pytest.raises(GenerationError, match="Row 0 goes on after padding"):
        model(ids, cache, attention_mask=mx.array([[0] * 3 + [1] * 7, [1] * 10]))
    cache = model.make_cache()
    model(ids, cache, attention_mask=mx.array([[1] * 10, [1] * 6 + [0] * 4]))
    model(ids, cache, attention_mask=mx.array([[1] * 10, [0] * 10]))  # more of the first row


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 6}, "num_hidden_layers (6) is not a multiple of 4."),
        ({"num_attention_heads": 1, "num_key_value_heads": 1},
         "num_attention_heads (1) is odd, but heads come in pairs."),
        ({"sliding_window": None}, "sliding_window is missing."),
        ({"sliding_window": [16]}, "sliding_window is [16], not a whole number from 1 to "
         "1073741824."),
        ({"mb_per_layer": 4}, "mb_per_layer is 4, but Phi models have 2."),
        ({"mamba_d_state": 0}, "mamba_d_state is 0, not a whole number from 1 to 1024."),
        ({"mamba_d_conv": True}, "mamba_d_conv is True, not a whole number from 1 to 64."),
        ({"mamba_dt_rank": "all"}, "mamba_dt_rank is 'all', not a whole number from 1 to 64."),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}},
         "rope_scaling is set, but this model has no positions."),
    ],
)  # fmt: skip
def test_what_a_config_may_not_say(folder: Path, changes: dict[str, Any], told: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        build_model({**config, **changes})
    assert str(caught.value) == f"config.json: {told}"


def test_sizes_of_the_state_are_those_of_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    other = {"mamba_d_state": 8, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 6}
    layer = build_model({**config, **other}).layers[0].attn
    assert layer.A_log.shape == (192, 8)
    assert layer.conv1d.weight.shape == (192, 1, 3)
    assert layer.x_proj.weight.shape == (6 + 16, 192)


def test_a_head_of_its_own_is_read(folder: Path, model: CausalLM, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "untied")
    stored = arrays(folder / "model.safetensors")
    stored["lm_head.weight"] = 2 * stored["model.embed_tokens.weight"]
    mx.save_safetensors(str(tmp_path / "untied" / "model.safetensors"), stored, {"format": "pt"})
    ids = ids_of(9)
    found = load_model(Checkpoint(tmp_path / "untied"))(ids)
    assert difference(found, 2 * model(ids)) <= EXACT


def stepwise(
    state: np.ndarray, delta: np.ndarray, inputs: np.ndarray, b: np.ndarray, c: np.ndarray,
    a: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    read = []
    for token in range(delta.shape[1]):
        step = delta[:, token, :, None]
        state = np.exp(step * a) * state + inputs[:, token, :, None] * b[:, token, None]
        read.append((state * c[:, token, None]).sum(-1))
    return np.stack(read, axis=1), state


@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 7])
@pytest.mark.parametrize(("states", "recompute"), [(1, False), (3, True), (100, False)])
def test_the_scan_is_its_recurrence(
    length: int, states: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with step sizes that forget at once, and in as many pieces as memory allows."""
    rng = np.random.default_rng(length)
    inner, d_state = 6, 4
    state = rng.standard_normal((2, inner, d_state))
    delta = np.exp(3 * rng.standard_normal((2, length, inner)) - 2)
    delta[1, length // 2] = BEGINS
    inputs = rng.standard_normal((2, length, inner))
    b, c = rng.standard_normal((2, 2, length, d_state))
    a = -np.exp(rng.standard_normal((inner, d_state)))
    for name in ("STATES", "RECOMPUTED"):
        monkeypatch.setattr(scan, name, states * state.size * 4)
    expected = stepwise(state, delta, inputs, b, c, a)
    first, steps, entering, enters, reads, decay = (
        mx.array(each.astype(np.float32)) for each in (state, delta, inputs, b, c, a)
    )
    found = selective_scan(first, steps, entering, enters, reads, decay, recompute)
    for mine, other in zip(found, expected, strict=True):
        assert difference(mine, mx.array(other.astype(np.float32))) <= 1e-5
    assert difference(last_state(first, steps, entering, enters, decay), found[1]) <= 1e-5
