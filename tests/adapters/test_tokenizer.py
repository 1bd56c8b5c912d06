"""A tokenizer beside an adapter, and two adapters in one folder: what is used, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import phimlx
from phimlx.adapters.adapter import Adapter
from phimlx.adapters.mlx_lm import write_adapter
from phimlx.adapters.peft import write_peft
from phimlx.hub.resolve import NANO
from phimlx.models.lora import LoRA
from phimlx.models.token_rows import TokenRows

EMBEDDING = "model.embed_tokens"
O_PROJ = "model.layers.0.self_attn.o_proj"
TEMPLATE = "{% for m in messages %}<|mark|>{{ m.content }}{% endfor %}"


def adapter(scale: float = 1.0, **changes: Any) -> Adapter:
    width = phimlx.load("nano").model.config.hidden_size
    layers = {O_PROJ: LoRA(mx.ones((width, 1)), mx.ones((1, width)) * scale, 0.01)}
    return Adapter(layers, tied=False, **changes)


def with_token(folder: Path, id: int) -> Path:
    """Put nano's tokenizer with more tokens, up to <|mark|>, and its template into a folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"] += [
        last | {"id": each, "content": "<|mark|>" if each == id else f"<|{each}|>"}
        for each in range(1532, id + 1)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|mark|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def used(names: str) -> tuple[str]:
    return (f"The adapter's own tokenizer and chat template are used: they add {names}.",)


MORE = "<|1532|>, <|1533|>, <|1534|> and 6 more"


def test_added_tokens_are_read_by_the_adapters_tokenizer(tmp_path: Path) -> None:
    width = phimlx.load("nano").model.config.hidden_size
    rows = {EMBEDDING: TokenRows((1532,), mx.ones((1, width)))}
    write_peft(tmp_path, adapter(rows=rows))
    phi = phimlx.load("nano", adapter=with_token(tmp_path, 1532))
    assert phi.remarks == used("<|mark|>")
    assert phi.encode("Hi")[0] == 1532
    assert 1532 in phi.eos
    assert phi.eos > phimlx.load("nano").eos
    row = phi.model.embed(mx.array([[1532]]))
    assert mx.array_equal(row, mx.ones((1, 1, width), row.dtype))


def test_a_larger_vocabulary_comes_with_the_adapter(tmp_path: Path) -> None:
    width = phimlx.load("nano").model.config.hidden_size
    weights = {f"{EMBEDDING}.weight": mx.ones((1541, width))}
    write_peft(tmp_path, adapter(weights=weights))
    phi = phimlx.load("nano", adapter=with_token(tmp_path, 1540))
    assert phi.remarks == used(MORE)
    assert phi.encode("Hi")[0] == 1540
    assert phi.model(mx.array([[1540]])).shape == (1, 1, 1541)
    assert len(phi.generate([1540], max_tokens=2).tokens) > 0


def test_tokens_without_rows_are_left_out(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    phi = phimlx.load("nano", adapter=with_token(tmp_path, 1540))
    assert phi.remarks == (
        f"The adapter's own tokenizer adds {MORE}, for which this model has no rows: the model's "
        "is used.",
    )
    assert phi.encode("Hi") == phimlx.load("nano").encode("Hi")


@pytest.mark.parametrize("damage", [None, "{"])
def test_the_same_or_a_damaged_tokenizer(damage: str | None, tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    shutil.copyfile(NANO / "tokenizer.json", tmp_path / "tokenizer.json")
    if damage:
        (tmp_path / "tokenizer.json").write_text(damage)
    phi = phimlx.load("nano", adapter=tmp_path)
    assert [remark[:41] for remark in phi.remarks] == (
        ["The adapter's own tokenizer is not used. "] if damage else []
    )
    assert phi.encode("Hi") == phimlx.load("nano").encode("Hi")


def test_a_template_of_its_own_is_told(tmp_path: Path) -> None:
    model = tmp_path / "nano"
    shutil.copytree(NANO, model)
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("<|mark|>", "<|user|>"))
    write_peft(tmp_path / "a", adapter())
    (tmp_path / "a" / "chat_template.jinja").write_text(TEMPLATE.replace("<|mark|>", "<|user|>"))
    assert phimlx.load(model, adapter=tmp_path / "a").remarks == ()
    (tmp_path / "a" / "chat_template.jinja").write_text(TEMPLATE)
    assert phimlx.load(model, adapter=tmp_path / "a").remarks == (
        "The adapter's folder has another chat template than the model, which is not used.",
    )


def logits(folder: Path) -> tuple[mx.array, tuple[str, ...]]:
    phi = phimlx.load("nano", adapter=folder)
    return phi.model(mx.array([[5, 6, 7]])), phi.remarks


@pytest.mark.parametrize("kind", ["peft", "mlx-lm", "both"])
def test_the_weights_that_are_there_decide(kind: str, tmp_path: Path) -> None:
    """A config may hold what both libraries write: tools that convert adapters leave such."""
    configs = []
    for name, write, scale in (("peft", write_peft, 1.0), ("mlx-lm", write_adapter, 9.0)):
        write(tmp_path / name, adapter(scale))
        configs.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
        if kind in (name, "both"):
            for file in (tmp_path / name).glob("*.safetensors"):
                (tmp_path / "it").mkdir(exist_ok=True)
                shutil.copyfile(file, tmp_path / "it" / file.name)
    (tmp_path / "it" / "adapter_config.json").write_text(json.dumps(configs[0] | configs[1]))
    found, remarks = logits(tmp_path / "it")
    expected, _ = logits(tmp_path / ("peft" if kind == "peft" else "mlx-lm"))
    assert mx.array_equal(found, expected)
    assert remarks == (
        (
            f"{tmp_path / 'it'} holds adapters.safetensors and adapter_model.safetensors: "
            "adapters.safetensors is read, adapter_model.safetensors is not.",
        )
        if kind == "both"
        else ()
    )


def test_requests_share_passes_with_an_adapter_that_changes_the_embedding(tmp_path: Path) -> None:
    width = phimlx.load("nano").model.config.hidden_size
    rows = {EMBEDDING: TokenRows((7, 300), 0.02 * mx.ones((2, width)))}
    write_peft(tmp_path, adapter(rows=rows))
    phi = phimlx.load("nano", adapter=tmp_path, dtype="float32")
    prompts = ["What is 3 + 4?", "Name a colour.", "Hi"]
    together = phi.generate_all(prompts, max_tokens=6, batch_size=3)
    alone = [phi.generate(prompt, max_tokens=6, temperature=0) for prompt in prompts]
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
