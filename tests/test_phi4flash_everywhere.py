"""Phi-4-mini-flash-reasoning through every door: show, generate, convert, train, fuse, evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import phimlx
from convert import Quantization, convert
from convert.measure.report import BUNDLED_TEXT
from phimlx import catalog
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.read import read_adapter
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.cli.group import cli
from phimlx.generation.sampler import Sampler
from tests.everything import everything

IDS = mx.array([[5, 9, 300, 17, 42, 8, 77, 120] * 4])  # twice the window
TAGS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a byte-level tokenizer that has the published tags."""
    folder = tmp_path_factory.mktemp("flash") / "Phi-4-mini-flash-reasoning"
    shutil.copytree(data / "tiny" / "tiny-phi4flash", folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["How many are three and four? They are seven."] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def logits(source: Path, adapter: Path | None = None) -> mx.array:
    model = load_model(Checkpoint(source))
    if adapter is not None:
        load_adapter(model, adapter)
    return model(IDS)


def difference(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def test_generate_and_show(folder: Path) -> None:
    told = json.loads(
        run("generate", "--model", folder, "--prompt", "How many?", "--max-tokens", "5", "--json")
    )
    assert told["text"] == phimlx.load(folder).generate("How many?", max_tokens=5).text
    told = json.loads(run("show", folder, "--context", "100", "--json"))
    assert (told["architecture"], told["context_length"]) == ("phi4flash", 1024)
    # One layer of 4 heads of 8, two windows of 16 tokens, three states of 128 channels.
    assert told["memory"][0]["cache"] == (100 + 2 * 16) * 2 * 4 * 8 * 4 + 3 * 128 * (16 + 3) * 4


def test_the_published_model() -> None:
    model = catalog.find("phi-4-mini-flash")
    assert model is not None
    assert model.sampling == {"temperature": 0.6, "top_p": 0.95}
    assert model.reasoning
    config = {
        "model_type": "phi4flash", "vocab_size": 200064, "hidden_size": 2560,
        "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 40,
        "num_key_value_heads": 20, "sliding_window": 512, "max_position_embeddings": 262144,
        "layer_norm_eps": 1e-5, "mb_per_layer": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    assert model.has_shape_of(config)
    built = build_model(config)
    parameters: Any = tree_flatten(built.parameters())
    assert len(parameters) == 434  # as many as the published index has
    assert sum(array.size for _, array in parameters) == model.parameters
    for shape in (model, built.config):
        assert shape.constant_cache_bytes(2) == 8 * 512 * 5120 + 9 * 5120 * (64 + 6)
        assert (shape.kv_layers, shape.head_dim, shape.num_key_value_heads) == (1, 64, 20)
    assert model.context_length == built.config.max_position_embeddings


def test_prompts_are_those_of_the_card(folder: Path) -> None:
    phi = phimlx.load(folder)
    assert phi.tokenizer is not None
    told = [{"role": "user", "content": "How many?"}]
    assert phi.tokenizer.decode(phi.encode(told)) == "<|user|>How many?<|end|><|assistant|>"


def test_reasoning_is_split_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phi = phimlx.load(folder)
    assert phi.tokenizer is not None
    said = iter(phi.tokenizer.encode("<think>Three and four.</think>They are seven.<|end|>",
                                     control=True))  # fmt: skip

    def sampler(self: Sampler, logits: mx.array) -> mx.array:
        return mx.array([next(said, 0)])

    monkeypatch.setattr(Sampler, "__call__", sampler)
    reply = phi.generate("How many?", max_tokens=60, temperature=0.6)
    assert reply.reasoning == "Three and four."
    assert reply.text.startswith("They are seven.")


@pytest.mark.parametrize("recipe", [Quantization(32, 4), "mixed-4-6"])
def test_what_steers_a_state_stays_unquantized(folder: Path, tmp_path: Path, recipe: Any) -> None:
    convert(
        folder, tmp_path / "out", recipe, **({"group_size": 32} if recipe == "mixed-4-6" else {})
    )
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    packed = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    assert {path.rpartition(".")[2] for path in packed} == {
        "embed_tokens", "in_proj", "out_proj", "Wqkv", "fc1", "fc2"
    }  # fmt: skip
    steering = ("A_log", "D", "conv1d.weight", "x_proj.weight", "dt_proj.weight")
    assert {stored[f"model.layers.2.attn.{name}"].dtype for name in steering} == {mx.float32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if recipe == "mixed-4-6":
        table = config["quantization"]
        more = {
            path for path, form in table.items() if isinstance(form, dict) and form["bits"] == 6
        }
        assert {"model.embed_tokens", "model.layers.5.attn.Wqkv"} <= more
        assert "model.layers.3.mlp.fc1" not in more
    convert(tmp_path / "out", tmp_path / "plain", dequantize=True)
    assert difference(logits(tmp_path / "out"), logits(tmp_path / "plain")) <= 1e-4
    assert difference(logits(tmp_path / "out"), logits(folder)) > 1e-3


def test_the_published_layout_comes_back(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "hf", layout="hf")
    before, after = (mx.load(str(each / "model.safetensors")) for each in (folder, tmp_path / "hf"))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(array, after[name]).item() for name, array in before.items())


def test_gguf_has_no_such_model(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    told = run("convert", folder, "--mlx-path", tmp_path / "x.gguf", "--export", "gguf", code=1)
    assert (
        f"Error: {folder} is a phi4flash model, which llama.cpp does not run: there is no GGUF "
        in told
    )
    assert not (tmp_path / "x.gguf").exists()


@everything
@pytest.mark.slow
def test_gptq_is_nearer_than_rounding(folder: Path, tmp_path: Path) -> None:
    """Memory, keys and values go from layer to layer while each is calibrated."""
    text = BUNDLED_TEXT.read_text()[:2000]
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:512]
    exact = load_model(Checkpoint(folder))(mx.array([tokens]))
    errors = {}
    for method in ("rounded", "gptq"):
        run("convert", folder, "--mlx-path", tmp_path / method, "-q", "--q-group-size", "32",
            *(["--q-method", "gptq"] if method == "gptq" else []))  # fmt: skip
        found = load_model(Checkpoint(tmp_path / method))(mx.array([tokens]))
        errors[method] = float(mx.square(found - exact).mean())
    assert errors["gptq"] < 0.9 * errors["rounded"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits"), [("lora", 4), ("dora", None)])
def test_tune_load_and_fuse(folder: Path, tmp_path: Path, kind: str, bits: int | None) -> None:
    source = folder
    if bits is not None:
        source = tmp_path / "flash-4bit"
        convert(folder, source, Quantization(32, bits))
    rows = [{"prompt": f"How many are {i}?", "completion": f"They are {i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    run("train", "--model", source, "--data", tmp_path / "rows.jsonl", "--adapter-path", adapter,
        "--iters", "3", "--batch-size", "4", "--learning-rate", "1e-2", "--grad-checkpoint",
        "--fine-tune-type", kind)  # fmt: skip
    assert len(read_adapter(adapter).layers) == 3 * 6 + 4 * 4 + 4
    tuned = logits(source, adapter)
    assert difference(tuned, logits(source)) > 1e-3
    if bits is None:
        run("fuse", "--model", source, "--adapter-path", adapter, "--save-path", fused)
        assert difference(logits(fused), tuned) <= 1e-4
    run("fuse", "--model", source, "--adapter-path", adapter, "--save-path", tmp_path / "peft",
        "--export", "peft")  # fmt: skip
    assert difference(logits(source, tmp_path / "peft"), tuned) <= 1e-4


def test_a_loss_is_measured(folder: Path, tmp_path: Path) -> None:
    row = {"prompt": "How many?", "completion": "Seven."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    told = json.loads(
        run("evaluate", "--model", folder, "--data", tmp_path / "rows.jsonl", "--json")
    )
    assert told["loss"] > 0
