"""The files around the tensors: config, card, tokenizer, licence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

from convert import Quantization, Recipe
from convert import convert as convert_model
from convert.card import model_card
from phimlx.catalog import find
from tests.convert.tiny import (
    MINI,
    PHI_4,
    failing,
    parameters,
    plan,
    same_bits,
    weights_of,
    write_model,
)


def test_config_is_written_in_the_hubs_dialect(tmp_path: Path) -> None:
    rope = {
        **MINI["rope_scaling"],
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
    }
    config = {k: v for k, v in MINI.items() if k not in ("rope_theta", "rope_scaling")}
    del config["torch_dtype"]
    config |= {
        "rope_parameters": rope,
        "dtype": "float32",
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "_name_or_path": "/home/somebody/models/x",
    }
    source = write_model(tmp_path / "source", config)
    convert_model(source, tmp_path / "out", Quantization(32, 4), "bfloat16")
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **MINI,
        "torch_dtype": "bfloat16",
        "quantization": quantization,
        "quantization_config": quantization,
    }


COMPANIONS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": 2}',
    "LICENSE": "MIT",
}
LEFT_BEHIND = {
    "modeling_phi3.py": "import os",
    "README.md": "# another card",
    "pytorch_model.bin": "pickle",
    "training_args.bin": "pickle",
    "notes.json": "{}",
}


def test_companions_come_along_and_code_does_not(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    for name, text in {**COMPANIONS, **LEFT_BEHIND}.items():
        (source / name).write_text(text)
    convert_model(source, tmp_path / "out")
    out = tmp_path / "out"
    own = {"config.json", "model.safetensors", "README.md"}
    assert {file.name for file in out.iterdir()} == {*COMPANIONS, *own}
    assert all((out / name).read_text() == text for name, text in COMPANIONS.items())


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--microsoft--phi-4"
    whole = write_model(repo / "blobs")
    (whole / "tokenizer.json").write_text("{}")
    snapshot = repo / "snapshots" / ("0123456789abcdef" * 3)[:40]
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    convert_model(snapshot, tmp_path / "out")
    copied = tmp_path / "out" / "tokenizer.json"
    assert copied.read_text() == "{}"
    assert not copied.is_symlink()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    (tmp_path / "secret").write_text("key")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    error = failing(source, tmp_path / "out")
    assert str(error) == "LICENSE is a link to a file outside the model's folder."
    assert error.hint == "Put the file itself there."


def test_companions_that_are_no_files(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    (source / "tokenizer.json").mkdir()
    assert str(failing(source, tmp_path / "out")) == "tokenizer.json is not a file."
    (source / "tokenizer.json").rmdir()
    os.mkfifo(source / "tokenizer.json")
    assert str(failing(source, tmp_path / "out")) == "tokenizer.json is not a file."


def test_a_companion_without_end(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    (source / "tokenizer.json").touch()
    os.truncate(source / "tokenizer.json", (64 << 20) + 1)
    assert str(failing(source, tmp_path / "out")) == "tokenizer.json is larger than 64.0 MB."


CARD = """\
---
library_name: "mlx"
pipeline_tag: "text-generation"
tags: ["mlx", "phimlx"]
license: "mit"
base_model: "microsoft/phi-4"
base_model_relation: "quantized"
---

# my-phi

[microsoft/phi-4](https://huggingface.co/microsoft/phi-4) at revision \
`0123456789abcdef0123456789abcdef01234567` converted to MLX with \
phimlx 0.1.0: weights at 4 bits in groups of 64.

```
phimlx chat --model my-phi
```
"""


def test_the_card_says_where_it_comes_from() -> None:
    source = Path("/hub/models--microsoft--phi-4/snapshots/" + ("0123456789abcdef" * 3)[:40])
    recipe = Recipe("uniform", Quantization())
    assert model_card("my-phi", source, find("phi-4"), "bfloat16", recipe, "mlx") == CARD


def test_the_card_of_an_unknown_model_names_no_path(tmp_path: Path) -> None:
    convert_model(write_model(tmp_path / "source"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "A model converted to MLX with phimlx" in card
    assert "weights in float32" in card


RECORD = {"repository": "someone/tune", "revision": "main", "commit": "0123456789" * 4, "files": {}}


def test_the_card_of_a_download_names_its_repository(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    own = source / ".cache" / "phimlx"
    own.mkdir(parents=True)
    (own / "download.json").write_text(json.dumps(RECORD))
    convert_model(source, tmp_path / "out", Quantization(32, 4))
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "someone/tune"\nbase_model_relation: "quantized"\n' in card
    origin = f"[someone/tune](https://huggingface.co/someone/tune) at revision `{'0123456789' * 4}`"
    assert f"\n{origin} converted to MLX" in card
    assert "license" not in card


LAYERS = """
## Layers

| Layers | Weights |
| --- | --- |
| `lm_head` | not quantized |
| `self_attn.qkv_proj` of every block | 8 bits in groups of 64 |
| `mlp.down_proj` of the blocks 0-1, 3 | 6 bits in groups of 64 |
| all others | 4 bits in groups of 64 |
"""


def test_the_card_lists_layers_of_another_form() -> None:
    layers: dict[str, Quantization | None] = {"lm_head": None}
    for block in range(4):
        path = f"model.layers.{block}"
        layers[f"{path}.self_attn.qkv_proj"] = Quantization(64, 8)
        layers[f"{path}.mlp.down_proj"] = Quantization(64, 4 if block == 2 else 6)
        layers[f"{path}.mlp.gate_up_proj"] = Quantization(64, 4)
    recipe = Recipe("mine", Quantization(64, 4))
    card = model_card("my-phi", Path("x"), None, "bfloat16", recipe, "mlx", layers)
    assert card.endswith(LAYERS)


# Hub layout


@pytest.mark.parametrize("config", [PHI_4, MINI])
def test_export_to_the_hubs_layout(tmp_path: Path, config: dict[str, Any]) -> None:
    weights = parameters(config, mx.bfloat16)
    source = write_model(tmp_path / "source", config, weights)
    planned = plan(source, tmp_path / "out", layout="hf", shard_bytes=40_000)
    planned.run()
    out = tmp_path / "out"
    assert same_bits(weights_of(out), weights)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(str(shard), framework="mlx") as opened:
            assert opened.metadata() == {"format": "pt"}
    written = json.loads((out / "config.json").read_text())
    assert written == {**config, "torch_dtype": "bfloat16"}
    assert 'library_name: "transformers"' in (out / "README.md").read_text()
    assert "converted to Hub layout" in (out / "README.md").read_text()


def test_a_quantized_model_goes_back_without_its_table(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", MINI)
    convert_model(source, tmp_path / "four", Quantization(32, 4))
    convert_model(tmp_path / "four", tmp_path / "out", dequantize=True, layout="hf")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == MINI
