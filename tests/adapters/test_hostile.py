"""Adapter folders that are wrong in every way that was thought of: a sentence each, and soon."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.adapters import peft_settings
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.read import read_adapter
from phimlx.errors import ConfigError, PhimlxError
from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM
from tests.convert.tiny import PHI_4

O_PROJ = "model.layers.0.self_attn.o_proj"
PLACE = f"base_model.model.{O_PROJ}"
PEFT: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
MLX_LM: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0},
}
RAW = {"digits": "9" * 5000, "deep": "[" * 9000 + "]" * 9000, "NaN": "NaN", "inf": "-Infinity"}
VALUES: dict[str, Any] = {
    "zero": 0,
    "negative": -3,
    "huge": 10**30,
    "float": 2.5,
    "tiny": 1e-320,
    "exponent": 1e308,
    "true": True,
    "text": "x" * 100_000,
    "escape": "\x1b]0;title\x07",
    "list": [1, [2, {"a": None}]],
    "table": {"a": {"b": [1]}, "..": "../..", "": 0},
    "names": ["..", "../../etc/passwd", ""],
    "numbers": [-1, 10**12],
    "twice": [3, 3],
}
KEYS = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "use_dora",
    "use_rslora",
    "lora_bias",
    "fan_in_fan_out",
    "ensure_weight_tying",
    "init_lora_weights",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "arrow_config",
    "base_model_name_or_path",
    "revision",
)
MLX_LM_KEYS = ("fine_tune_type", "lora_parameters", "num_hidden_layers", "base_model", "num_layers")
# Where any text or list of names may stand, where nothing is looked at, or where it is a number.
FINE = {
    *itertools.product(("target_modules", "exclude_modules"), ("text", "escape", "names")),
    *itertools.product(("base_model_name_or_path", "revision", "num_layers", "base_model"), VALUES),
    *itertools.product(("base_model_name_or_path", "revision", "num_layers", "base_model"), RAW),
    ("fan_in_fan_out", "true"),
    ("ensure_weight_tying", "true"),
    ("use_rslora", "true"),
    ("init_lora_weights", "true"),
    ("init_lora_weights", "text"),
    ("init_lora_weights", "escape"),
    ("lora_alpha", "float"),
    ("lora_alpha", "tiny"),
    *itertools.product(("rank_pattern", "alpha_pattern", "use_qalora", "arrow_config"), ("zero",)),
}


def peft_arrays(**others: mx.array) -> dict[str, mx.array]:
    return {
        f"{PLACE}.lora_A.weight": mx.ones((2, 64)),
        f"{PLACE}.lora_B.weight": mx.zeros((64, 2)),
        **others,
    }


def folder_of(folder: Path, config: str, arrays: dict[str, mx.array] | None = None) -> Path:
    (folder / "adapter_config.json").write_text(config)
    if "peft_type" in config or arrays is not None:
        arrays = peft_arrays() if arrays is None else arrays
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    else:
        low = {f"{O_PROJ}.lora_a": mx.ones((64, 2)), f"{O_PROJ}.lora_b": mx.zeros((2, 64))}
        mx.save_safetensors(str(folder / "adapters.safetensors"), low)
    return folder


def refused(folder: Path) -> PhimlxError | None:
    """The error that loading ends with, which is one short sentence and comes soon."""
    begin, found = time.process_time(), None
    try:
        adapter = read_adapter(folder)
        model = Phi3ForCausalLM(Phi3Config.from_dict(PHI_4))
        load_adapter(model, adapter, Path("x"), PHI_4)
    except PhimlxError as error:
        found = error
    assert time.process_time() - begin < 10
    if found is not None:
        assert len(str(found)) < 500
        assert str(found).endswith(".")
    return found


CASES = [
    (usual, key, name)
    for usual, keys in (("PEFT", KEYS), ("MLX_LM", MLX_LM_KEYS))
    for key, name in itertools.product(keys, (*VALUES, *RAW))
]


@pytest.mark.parametrize(("usual", "key", "name"), CASES)
def test_settings(usual: str, key: str, name: str, tmp_path: Path) -> None:
    config = PEFT if usual == "PEFT" else MLX_LM
    text = json.dumps({**config, key: VALUES.get(name, "RAW")})
    if name in RAW:
        text = text.replace('"RAW"', RAW[name])
    error = refused(folder_of(tmp_path, text))
    assert (error is None) == ((key, name) in FINE and name not in ("digits", "deep")), error


TENSORS: dict[str, dict[str, mx.array]] = {
    "other rank": {f"{PLACE}.lora_A.weight": mx.ones((3, 64))},
    "rank of B": {f"{PLACE}.lora_B.weight": mx.ones((64, 1))},
    "one dimension": {f"{PLACE}.lora_A.weight": mx.ones((128,))},
    "three dimensions": {f"{PLACE}.lora_A.weight": mx.ones((2, 64, 1))},
    "nothing in it": {f"{PLACE}.lora_A.weight": mx.zeros((0, 64))},
    "a number": {f"{PLACE}.lora_B.weight": mx.array(1.0)},
    "other width": {f"{PLACE}.lora_A.weight": mx.ones((2, 65))},
    "NaN": {f"{PLACE}.lora_A.weight": mx.full((2, 64), float("nan"))},
    "infinite": {f"{PLACE}.lora_B.weight": mx.full((64, 2), float("inf"))},
    "integers": {f"{PLACE}.lora_B.weight": mx.ones((64, 2), mx.int32)},
    "half of one": {f"{PLACE}x.lora_A.weight": mx.ones((2, 64))},
    "unknown layer": {
        "base_model.model.model.layers.77.mlp.up.lora_A.weight": mx.ones((2, 64)),
        "base_model.model.model.layers.77.mlp.up.lora_B.weight": mx.ones((64, 2)),
    },
    "dots": {"base_model.model.model..layers/../x.weight": mx.ones((4,))},
    "a path": {"base_model.model.../../etc/passwd.weight": mx.ones((4,))},
    "escape": {"base_model.model.\x1b[31m.weight": mx.ones((4,))},
    "long": {f"base_model.model.{'x' * 9000}.weight": mx.ones((4,))},
    "line": {"base_model.model.a\nb.weight": mx.ones((4,))},
    "no prefix": {"model.norm.weight": mx.ones((64,))},
    "twice": {
        "base_model.model.model.norm.weight": mx.ones((64,)),
        "base_model.model.model.norm.base_layer.weight": mx.ones((64,)),
    },
    "magnitude": {f"{PLACE}.lora_magnitude_vector": mx.ones((64,))},
    "bias of B": {f"{PLACE}.lora_B.bias": mx.ones((64,))},
    "rows": {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": mx.ones((2, 64))
    },
    "norm of another size": {"base_model.model.model.norm.weight": mx.ones((65,))},
    "norm of two dimensions": {"base_model.model.model.norm.weight": mx.ones((64, 1))},
    "embedding of another width": {"base_model.model.model.embed_tokens.weight": mx.ones((48, 65))},
    "embedding alone of another height": {
        "base_model.model.model.embed_tokens.weight": mx.ones((50, 64))
    },
    "embedding of no dimension": {"base_model.model.model.embed_tokens.weight": mx.array(1.0)},
    "two vocabularies": {
        "base_model.model.model.embed_tokens.weight": mx.ones((50, 64)),
        "base_model.model.lm_head.weight": mx.ones((51, 64)),
    },
    "a bias that is not there": {"base_model.model.lm_head.bias": mx.ones((48,))},
    "embedding without B": {
        "base_model.model.model.embed_tokens.lora_embedding_A": mx.ones((2, 48))
    },
    "another method": {f"{PLACE}.hada_w1_a": mx.ones((2, 64))},
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, json.dumps(PEFT), peft_arrays(**TENSORS[name]))
    assert refused(folder) is not None


@pytest.mark.parametrize(
    "method",
    ["IA3", "LOHA", "LOKR", "ADALORA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "OFT", "BOFT",
     "VERA", "LN_TUNING", "POLY", "HRA", "FOURIERFT", "XLORA", "TRAINABLE_TOKENS", "ROAD", "MISS"],
)  # fmt: skip
def test_other_methods(method: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, json.dumps({**PEFT, "peft_type": method}))
    error = refused(folder)
    assert str(error) == (
        f"adapter_config.json: peft_type is '{method}'; phimlx reads LoRA and DoRA."
    )
    assert error is not None
    assert error.hint == (
        "Merge it in PEFT with merge_and_unload, and convert the model that this makes."
    )


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga", "PiSSA_niter_16"])
def test_methods_that_change_the_base_as_nobody_can_again(start: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, json.dumps({**PEFT, "init_lora_weights": start}))
    error = refused(folder)
    assert str(error) == (
        f"adapter_config.json: init_lora_weights is '{start}', which changes the model's own "
        "weights too."
    )
    assert error is not None
    assert error.hint is not None
    assert error.hint.startswith("Save it in PEFT with path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("start", ["eva", "gaussian", "orthogonal", "mica", True, False, None])
def test_methods_that_leave_the_base(start: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, json.dumps({**PEFT, "init_lora_weights": start}))
    assert refused(folder) is None


def test_a_pattern_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_settings, "PATTERN_SECONDS", 0.5)
    config = {**PEFT, "alpha_pattern": {r"([\w.]+)+!": 3}}
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder_of(tmp_path, json.dumps(config)))
    assert str(caught.value) == (
        "adapter_config.json: alpha_pattern has the patterns '([\\\\w.]+)+!', which take too long "
        "to match."
    )
    assert caught.value.hint == "Write names of layers there."


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes(seed: int, tmp_path: Path) -> None:
    """A file whose bytes were changed at random loads, or is refused with a sentence."""
    random = np.random.default_rng(seed)
    folder = folder_of(tmp_path, json.dumps(PEFT))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = bytearray((folder / name).read_bytes())
        for place in random.integers(0, min(len(data), 400), 3):
            data[place] = int(random.integers(0, 256))
        (folder / name).write_bytes(data[: len(data) - int(random.integers(0, 2)) * seed])
    refused(folder)
