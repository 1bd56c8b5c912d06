"""Models in Llama's and Mistral's layout: as transformers computes them, and in every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

import phimlx
from convert import Quantization, convert
from phimlx import catalog
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.cli.group import cli
from phimlx.errors import ConfigError
from phimlx.evaluation import parity
from phimlx.models import registry
from tests.checkpoint.test_tensors import split
from tests.convert.tiny import PHI_4, parameters, same_bits, weights_of, write_model

NANO = Path(phimlx.__file__).parent / "assets" / "nano"
MODELS = Path(__file__).parents[1] / "goldens" / "models"
LLAMA: dict[str, Any] = {
    **PHI_4,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "unsloth_fixed": True,
}


BIG = {"vocab_size": 1536, "bos_token_id": 1520, "eos_token_id": 1520}  # as the tokenizer has it


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny phi-4 with nano's tokenizer and no template of its own."""
    folder = write_model(tmp_path_factory.mktemp("made") / "fused", {**PHI_4, **BIG})
    settings = json.loads((NANO / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(NANO / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def folder(fused: Path) -> Path:
    """The same in Llama's shape."""
    weights = split(weights_of(fused))
    folder = write_model(fused.with_name("llama"), {**LLAMA, **BIG}, weights, shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fused / name, folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-window"])
def test_every_case_equals_the_reference(name: str) -> None:
    results = list(parity.run(MODELS / name, MODELS / name / "reference.safetensors"))
    assert len(results) >= 4
    assert [result for result in results if not result.passed] == []
    assert all(result.top1 == 1 for result in results)


def test_a_window_that_a_llama_config_names_is_none(tmp_path: Path) -> None:
    shutil.copytree(MODELS / "llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "sliding_window": 24}))
    results = parity.run(tmp_path / "model", MODELS / "llama" / "reference.safetensors")
    assert all(result.passed for result in results)


def test_what_a_config_leaves_out_is_transformers_own() -> None:
    """Source: `LlamaConfig` and `MistralConfig` of transformers 5."""
    bare = {
        key: LLAMA[key]
        for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "vocab_size",
        )
    }  # fmt: skip
    llama = build_model({**bare, "model_type": "llama"}).config
    assert llama.norm_eps == 1e-6
    assert llama.max_position_embeddings == 2048
    assert llama.num_key_value_heads == llama.num_attention_heads == 4
    assert llama.rope.theta == 10_000
    assert llama.sliding_window is None
    mistral = build_model({**bare, "model_type": "mistral", "num_attention_heads": 8}).config
    assert (mistral.norm_eps, mistral.max_position_embeddings) == (1e-6, 131_072)
    assert (mistral.num_key_value_heads, mistral.sliding_window) == (8, 4096)
    null = {**bare, "model_type": "mistral", "num_attention_heads": 8, "sliding_window": None}
    assert build_model(null).config.sliding_window is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True, but Phi models have False."),
        ({"mlp_bias": True}, "mlp_bias is True, but Phi models have False."),
        ({"pretraining_tp": 2}, "pretraining_tp is 2, but Phi models have 1."),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but Phi models have 'silu'."),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5, but llama models turn all channels.",
        ),
    ],
)
def test_what_is_computed_otherwise_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model({**LLAMA, **changed})
    assert str(caught.value) == f"config.json: {message}"


def test_llama_3_s_rope_is_refused() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="rope_type is 'llama3'"):
        build_model({**LLAMA, "rope_scaling": scaling})


def test_of_its_own_layout_it_is_the_fused_model(folder: Path, fused: Path) -> None:
    assert same_bits(weights_of(folder), weights_of(fused))
    tokens = mx.array([[1, 5, 9, 33, 2, 7]])
    logits = [load_model(Checkpoint(each))(tokens) for each in (folder, fused)]
    assert mx.array_equal(*logits)
    assert Checkpoint(folder).config["model_type"] == "phi3"


@pytest.mark.parametrize("quantization", [None, Quantization(32, 4), "mixed-4-6"])
def test_it_converts_to_the_same_bytes(
    folder: Path, fused: Path, tmp_path: Path, quantization: Any
) -> None:
    for source, out in ((folder, "split"), (fused, "fused")):
        convert(source, tmp_path / out, quantization)
    assert same_bits(weights_of(tmp_path / "split"), weights_of(tmp_path / "fused"))
    configs = [
        json.loads((tmp_path / out / "config.json").read_text()) for out in ("split", "fused")
    ]
    assert configs[0]["model_type"] == "phi3"
    assert configs[0]["architectures"] == ["Phi3ForCausalLM"]
    assert configs[0].get("quantization") == configs[1].get("quantization")


def test_packed_as_mlx_lm_packs_it(tmp_path: Path) -> None:
    """Whose table of exceptions names the split layers."""
    packed = tmp_path / "packed"
    convert(write_model(tmp_path / "plain", PHI_4), packed, Quantization(32, 4))
    weights = weights_of(packed)
    one = {"group_size": 32, "bits": 4}
    table = {**one, "model.layers.0.self_attn.q_proj": {**one, "mode": "affine"}}
    split_up = write_model(tmp_path / "split", {**LLAMA, "quantization": table}, split(weights), 2)
    assert same_bits(weights_of(split_up), weights)
    assert same_bits(dict(tree_flatten(load_model(Checkpoint(split_up)).parameters())), weights)


def test_commands(folder: Path, fused: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(cli, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    shown, other = run("show", str(folder)), run("show", str(fused))
    assert {k: v for k, v in shown.items() if k not in ("name", "path", "file_bytes")} == {
        k: v for k, v in other.items() if k not in ("name", "path", "file_bytes")
    }
    prompt = ("--prompt", "Hello", "--max-tokens", "5", "--temp", "0")
    replies = [run("generate", "--model", str(each), *prompt) for each in (folder, fused)]
    assert replies[0]["text"] == replies[1]["text"]
    (tmp_path / "train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        * 4
    )
    adapter, made = str(tmp_path / "adapter"), tmp_path / "fused"
    run(
        "train", "--model", str(folder), "--data", str(tmp_path), "--iters", "2",
        "--adapter-path", adapter, "--batch-size", "1",
    )  # fmt: skip
    run("fuse", "--model", str(folder), "--adapter-path", adapter, "--save-path", str(made))
    assert "model.layers.0.self_attn.qkv_proj.weight" in weights_of(made)


def test_its_template_is_told_by_control_tokens(folder: Path) -> None:
    phi = phimlx.load(folder)
    ids = phi.template.encode([{"role": "user", "content": "Hi"}])
    assert phi.tokenizer.decode(ids).startswith("<|user|>")


def test_only_sizes_of_the_family_are_listed_as_ours() -> None:
    """`phimlx list` looks through a cache that holds everybody's Llamas."""
    sizes = {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 17920}
    assert catalog.has_known_sizes({"model_type": "llama", **sizes})
    assert not catalog.has_known_sizes({**sizes, "intermediate_size": 13824})  # Llama-2-13b
    shared = {
        dialect.model_type
        for each in registry.ARCHITECTURES
        for dialect in each.dialects
        if dialect.is_shared
    }
    assert shared == {"llama", "mistral"}


def test_a_catalogue_s_name_needs_its_shape() -> None:
    config = Checkpoint(MODELS / "llama").config
    assert catalog.by_config(config, "unsloth/phi-4") is None
    published = catalog.find("phi-4")
    assert published is not None
    own = {
        **config,
        "num_hidden_layers": published.num_hidden_layers,
        "hidden_size": published.hidden_size,
        "vocab_size": published.vocab_size,
    }
    assert catalog.by_config(own, "unsloth/phi-4") is published


def test_weights_of_both_shapes_are_one(tmp_path: Path) -> None:
    weights = parameters(PHI_4)
    made = write_model(tmp_path / "llama", LLAMA, split(weights))
    assert same_bits(weights_of(made), weights)
