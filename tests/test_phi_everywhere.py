"""A phi model does what every text model does: generate, convert, quantize, tune, fuse, export."""

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
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.read import read_adapter
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.errors import ConversionError, PromptError
from phimlx.files import read_json
from phimlx.generation.sampler import Sampler
from phimlx.models.base import CausalLM

IDS = mx.array([[5, 9, 300, 17, 42, 8, 77, 120]])
TEXT = ["def total(values):\n    return sum(values)\n", "Instruct: Add.\nOutput: 7\n"] * 4


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny phi-1.5 with a byte-level tokenizer of the published form."""
    folder = tmp_path_factory.mktemp("phi") / "phi-1_5"
    shutil.copytree(data / "tiny" / "tiny-phi15", folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


def logits(source: Path, adapter: Path | None = None) -> mx.array:
    model = load_model(Checkpoint(source))
    if adapter is not None:
        load_adapter(model, adapter)
    return model(IDS)


def difference(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def test_generate_and_show(folder: Path) -> None:
    told = json.loads(
        run("generate", "--model", folder, "--prompt", "Add.", "--max-tokens", "5", "--json")
    )
    assert len(told["text"]) > 0
    told = json.loads(run("show", folder, "--json"))
    assert told["architecture"] == "phi"
    assert told["context_length"] == 2048


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_quantization_loads_in_mlx_lm(folder: Path, tmp_path: Path, bits: int) -> None:
    from mlx_lm.utils import load_model as load_in_mlx_lm

    convert(folder, tmp_path / "out", Quantization(32, bits))
    theirs, _ = load_in_mlx_lm(tmp_path / "out")
    assert difference(logits(tmp_path / "out"), theirs(IDS)) <= 1e-5


def test_mixed_recipes_spend_on_what_is_sensitive(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", "mixed-4-6", group_size=32)
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    more = {path for path, form in table.items() if isinstance(form, dict) and form["bits"] == 6}
    assert {"lm_head", "model.embed_tokens", "model.layers.1.self_attn.v_proj"} <= more
    assert "model.layers.1.mlp.fc1" not in more


@pytest.mark.parametrize("name", ["tiny-phi15-mixformer", "tiny-phi2-msft"])
def test_older_layouts_convert_to_todays(data: Path, name: str, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model as load_in_mlx_lm

    source = data / "tiny" / name
    for layout in ("mlx", "hf"):
        convert(source, tmp_path / layout, layout=layout)
        assert mx.array_equal(logits(tmp_path / layout), logits(source)).item()
    theirs, _ = load_in_mlx_lm(tmp_path / "mlx")
    assert difference(logits(source), theirs(IDS)) <= 1e-5


@pytest.mark.slow
def test_gptq_is_nearer_than_rounding(folder: Path, tmp_path: Path) -> None:
    """On the kind of text that it was calibrated with; every layer here has a bias."""
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


def test_gguf_holds_every_tensor_under_llama_cpps_names(folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    run("convert", folder, "--mlx-path", tmp_path / "phi.gguf", "--export", "gguf")
    reader = gguf.GGUFReader(tmp_path / "phi.gguf")
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.PHI2]}
    names = {tensor.name for tensor in reader.tensors}
    allowed = {
        f"{name.format(bid=layer)}.{kind}"
        for name in known
        for layer in range(3)
        for kind in ("weight", "bias")
    }
    assert names <= allowed
    weights = dict(tree_flatten(load_model(Checkpoint(folder)).parameters()))
    assert len(names) == len(weights)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "phi2"
    assert fields["phi2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert fields["phi2.rope.dimension_count"] == 8
    assert fields["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(("layout", "allowed"), [("gguf", 3e-3), ("gguf-q8_0", 3e-2)])
def test_a_gguf_file_read_again_gives_the_references_logits(
    folder: Path, tmp_path: Path, layout: str, allowed: float
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
    convert(folder, tmp_path / "phi.gguf", layout=layout)
    convert(tmp_path / "phi.gguf", tmp_path / "back", dtype="float32")
    assert difference(logits(tmp_path / "back"), logits(folder)) <= allowed


def test_gguf_has_no_norms_of_queries_and_keys(folder: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
    source = tmp_path / "source"
    shutil.copytree(data / "tiny" / "tiny-phi-qknorm", source)
    shutil.copy(folder / "tokenizer.json", source)
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "out.gguf", layout="gguf")
    assert str(caught.value) == (
        f"{source} has tensors that llama.cpp's phi2 models have not: "
        "model.layers.0.self_attn.k_layernorm.bias, model.layers.0.self_attn.k_layernorm.weight, "
        "model.layers.0.self_attn.q_layernorm.bias and 5 more."
    )
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["tiny-phi2", "tiny-phi15", "tiny-phi-qknorm", "tiny-phi2-msft"])
def test_what_transformers_wrote_comes_back_from_mlx(data: Path, tmp_path: Path, name: str) -> None:
    """Weights bit for bit and every setting of a config that transformers read."""
    convert(data / "tiny" / name, tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "hf", layout="hf")
    theirs = data / "tiny" / name.removesuffix("-msft")
    before, after = (mx.load(str(each / "model.safetensors")) for each in (theirs, tmp_path / "hf"))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[key], before[key]).item() for key in before)
    configs = [read_json(each / "config.json") for each in (theirs, tmp_path / "hf")]
    deciding = ("model_type", "hidden_size", "layer_norm_eps", "partial_rotary_factor",
                "hidden_act", "num_attention_heads", "vocab_size")  # fmt: skip
    assert {key: configs[1][key] for key in deciding} == {key: configs[0][key] for key in deciding}
    assert {config.get("rope_theta", 10000.0) for config in configs} == {10000.0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4])
def test_tune_load_and_fuse(folder: Path, tmp_path: Path, kind: str, bits: int | None) -> None:
    source = folder
    if bits is not None:
        source = tmp_path / "phi-1_5-4bit"
        convert(folder, source, Quantization(32, bits))
    rows = [{"prompt": f"Add {i}.", "completion": f"It is {i + 1}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    run("train", "--model", source, "--data", tmp_path / "rows.jsonl", "--adapter-path", adapter,
        "--iters", "3", "--batch-size", "4", "--learning-rate", "1e-2",
        "--fine-tune-type", kind)  # fmt: skip
    layers = read_adapter(adapter).layers
    assert len(layers) == 3 * 6
    tuned = logits(source, adapter)
    assert difference(tuned, logits(source)) > 1e-3
    if bits is None:
        run("fuse", "--model", source, "--adapter-path", adapter, "--save-path", fused)
        assert difference(logits(fused), tuned) <= 1e-5
    run("fuse", "--model", source, "--adapter-path", adapter, "--save-path", tmp_path / "peft",
        "--export", "peft")  # fmt: skip
    assert difference(logits(source, tmp_path / "peft"), tuned) <= 1e-5


def test_full_fine_tuning_trains_the_heads_bias(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "def total(values):\n    return sum(values)\n"}] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("train", "--model", folder, "--data", tmp_path / "rows.jsonl", "--adapter-path",
        tmp_path / "full", "--iters", "2", "--batch-size", "4", "--num-layers", "-1",
        "--fine-tune-type", "full")  # fmt: skip
    model = load_model(Checkpoint(folder))
    before = model.lm_head.bias
    load_adapter(model, tmp_path / "full")
    assert not mx.array_equal(model.lm_head.bias, before).item()


def test_the_loss_is_the_models_own(folder: Path) -> None:
    """Head with a bias: frozen and trained, the loss and its gradients are the plain ones."""
    import mlx.nn as nn

    from phimlx.training.loss import linear_cross_entropy, measured_losses

    model: CausalLM = load_model(Checkpoint(folder))
    hidden = model.hidden_states(IDS)[0]
    targets, weights = mx.roll(IDS[0], -1), mx.ones(IDS.size) / IDS.size
    head = model.output_layer

    def plain(parameters: dict[str, Any], hidden: mx.array) -> mx.array:
        head.update(parameters)
        return nn.losses.cross_entropy(head(hidden), targets, reduction="mean")

    def ours(parameters: dict[str, Any], hidden: mx.array) -> mx.array:
        head.update(parameters)
        return linear_cross_entropy(head, hidden, targets, weights, rows=3)

    measured = (measured_losses(head, hidden, targets, rows=3) * weights).sum()
    for frozen in (False, True):
        (head.freeze if frozen else head.unfreeze)()
        parameters = head.trainable_parameters()
        places = [1] if frozen else [0, 1]
        expected = mx.value_and_grad(plain, argnums=places)(parameters, hidden)
        found = mx.value_and_grad(ours, argnums=places)(parameters, hidden)
        pairs = zip(tree_flatten(expected), tree_flatten(found), strict=True)
        for (name, one), (other, two) in pairs:
            assert name == other
            assert difference(two, one) <= 1e-5, name
    assert difference(measured, plain(head.parameters(), hidden)) <= 1e-6


def test_evaluate_and_forecast(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Add 1.", "completion": "2"}) + "\n")
    told = json.loads(
        run("evaluate", "--model", folder, "--data", tmp_path / "rows.jsonl", "--json")
    )
    assert told["loss"] > 0


def test_prompts_are_those_of_the_card(folder: Path, tmp_path: Path) -> None:
    """phi-1.5 as its card asks it; a copy named as phi-2 as that one's; and each card's chat."""
    other = tmp_path / "phi-2"
    other.symlink_to(folder)
    told = [{"role": "user", "content": "Why?"}]
    for name, form, expected in (
        (folder, None, "Why?\n\nAnswer:"),
        (folder, "phi-1.5-chat", "Alice: Why?\n\nBob:"),
        (other, None, "Instruct: Why?\nOutput:"),
        (other, "phi-2-chat", "Alice: Why?\nBob:"),
        (other, "completion", "Why?"),
    ):
        phi = phimlx.load(name)
        if form is not None:
            phi.use_prompt_form(form)
        assert phi.tokenizer is not None
        assert phi.tokenizer.decode(phi.encode(told)) == expected
        assert phi.encode("def f():", raw=True) == phi.tokenizer.encode("def f():")
    with pytest.raises(PromptError, match="no prompt form named 'phi-9'"):
        phi.use_prompt_form("phi-9")


def test_a_reply_ends_where_the_form_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next speaker in a chat, and not where the prompt is raw."""
    phi = phimlx.load(folder)
    assert phi.tokenizer is not None
    said = phi.tokenizer.encode(" Because.\nAlice: And?")
    phi.use_prompt_form("phi-1.5-chat")
    for raw, text in ((False, " Because."), (True, " Because.\nAlice: And?")):
        scripted = iter([*said, 0])

        def sampler(self: Sampler, logits: mx.array, tokens: Any = scripted) -> mx.array:
            return mx.array([next(tokens, 0)])

        monkeypatch.setattr(Sampler, "__call__", sampler)
        assert phi.generate("Why?", raw=raw, max_tokens=len(said)).text == text


def test_python(folder: Path) -> None:
    phi = phimlx.load(folder)
    reply = phi.generate("Add.", max_tokens=4, temperature=0)
    assert reply.finish_reason in ("length", "stop")
