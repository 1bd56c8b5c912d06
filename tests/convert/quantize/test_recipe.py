"""Recipes: the named ones, a file of the user's own, and what of them arrives in the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from convert import Quantization, Recipe, read_recipe
from convert import convert as convert_model
from convert.quantize.recipe import Rule, mixed, recipes_of
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import ConversionError
from phimlx.models import registry
from tests.convert.tiny import MINI, PHI_4, parameters, write_model

PHI3 = registry.of_config({"model_type": "phi3"})

WIDTHS = {"model.embed_tokens": 64, "lm_head": 64, "model.layers.0.mlp.down_proj": 96}


def test_rules_give_layers_bits_of_their_own() -> None:
    rules = (Rule("lm_head", Quantization(64, 8)), Rule("*.down_proj", None))
    assert Recipe("own", Quantization(64, 4), rules).assign(WIDTHS, 1) == (
        {
            "model.embed_tokens": Quantization(64, 4),
            "lm_head": Quantization(64, 8),
            "model.layers.0.mlp.down_proj": None,
        },
        (),
    )


def test_layers_that_groups_do_not_divide() -> None:
    assigned, undivided = Recipe("own", Quantization(64, 4)).assign(WIDTHS, 1)
    assert assigned["model.layers.0.mlp.down_proj"] is None
    assert undivided == ("model.layers.0.mlp.down_proj",)


@pytest.mark.parametrize(
    ("blocks", "ends", "matched"),
    [
        (32, 0.125, [0, 1, 2, 3, 28, 29, 30, 31]),
        (40, 0.125, [0, 1, 2, 3, 4, 35, 36, 37, 38, 39]),
        (4, 0.125, [0, 3]),
        (1, 0.125, [0]),
        (4, 0.5, [0, 1, 2, 3]),
        (5, 0.5, [0, 1, 3, 4]),
    ],
)
def test_ends(blocks: int, ends: float, matched: list[int]) -> None:
    rule = Rule("*.down_proj", None, ends)
    paths = [f"model.layers.{block}.mlp.down_proj" for block in range(blocks)]
    assert [block for block, path in enumerate(paths) if rule.applies(path, blocks)] == matched


def test_ends_are_of_blocks() -> None:
    assert not Rule("*", None, 0.5).applies("lm_head", 4)


def test_named_recipes_protect_what_matters() -> None:
    """Phi-4-mini's layers: every bit that a mixed recipe adds is where it was meant."""
    blocks = 32
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    paths = [f"model.layers.{block}.{layer}" for block in range(blocks) for layer in layers]
    widths = dict.fromkeys(["model.embed_tokens", "lm_head", *paths], 3072)
    assigned, _ = mixed(4, 6, PHI3).assign(widths, blocks)
    more = {path for path, chosen in assigned.items() if chosen == Quantization(64, 6)}
    ends = (0, 1, 2, 3, 28, 29, 30, 31)
    assert more == {
        "model.embed_tokens",
        "lm_head",
        *(f"model.layers.{n}.{layers[0]}" for n in range(blocks)),
        *(f"model.layers.0.{layer}" for layer in layers),
        *(f"model.layers.{n}.{layer}" for n in ends for layer in (layers[1], layers[3])),
    }
    assert set(assigned.values()) == {Quantization(64, 4), Quantization(64, 6)}


@pytest.mark.parametrize("name", list(recipes_of(PHI3)))
@pytest.mark.parametrize("config", [PHI_4, MINI])
def test_named_recipes_load_as_they_were_made(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    source = write_model(tmp_path / "source", config, parameters(config, mx.bfloat16))
    result = convert_model(source, tmp_path / "out", name, group_size=32)
    low, high = map(int, name.split("-")[1:])
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {key: table[key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 32,
        "bits": low,
        "mode": "affine",
    }
    assert table["model.embed_tokens"] == {"group_size": 32, "bits": high, "mode": "affine"}
    assert (result.recipe, result.quantization) == (name, Quantization(32, low))

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen: bool | dict[str, Any] = table.get(path, True)
        return hasattr(module, "to_quantized") and chosen

    model = load_model(Checkpoint(source))
    nn.quantize(model, 32, low, class_predicate=form)
    tokens = mx.array([[1, 5, 9, 33, 2, 7] * 8])
    assert mx.array_equal(load_model(Checkpoint(tmp_path / "out"))(tokens), model(tokens))
    head = model.model.embed_tokens if config["tie_word_embeddings"] else model.lm_head
    assert head.bits == high
    assert [layer.mlp.gate_up_proj.bits for layer in model.layers] == [high, low]


OWN = """
bits = 3
group_size = 32

[[layers]]
match = "lm_head"
keep = true

[[layers]]
match = "*.down_proj"
ends = 0.25
bits = 8

[[layers]]
match = "*.down_proj"
mode = "mxfp4"

[[layers]]
match = "model.embed_tokens"
group_size = 64
"""


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(OWN)
    recipe = read_recipe(file)
    assert recipe == Recipe(
        "mine",
        Quantization(32, 3),
        (
            Rule("lm_head", None),
            Rule("*.down_proj", Quantization(32, 8), 0.25),
            Rule("*.down_proj", Quantization(32, 4, "mxfp4")),
            Rule("model.embed_tokens", Quantization(64, 3)),
        ),
    )
    config = {**PHI_4, "num_hidden_layers": 3}
    convert_model(write_model(tmp_path / "source", config), tmp_path / "out", recipe)
    model = load_model(Checkpoint(tmp_path / "out"))
    down = [layer.mlp.down_proj for layer in model.layers]
    assert [(layer.bits, layer.mode) for layer in down] == [
        (8, "affine"),
        (4, "mxfp4"),
        (8, "affine"),
    ]
    assert isinstance(model.lm_head, nn.Linear)
    assert model.model.embed_tokens.group_size == 64


def test_an_empty_recipe_is_the_usual_one(tmp_path: Path) -> None:
    file = tmp_path / "empty.toml"
    file.touch()
    assert read_recipe(file) == Recipe("empty", Quantization(64, 4), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = 7", "bits is 7, but affine has 2 or 3 or 4 or 5 or 6 or 8."),
        ("bits = true", "bits is True, but affine has 2 or 3 or 4 or 5 or 6 or 8."),
        ('bits = "4"', "bits is '4', but affine has 2 or 3 or 4 or 5 or 6 or 8."),
        ("group_size = 16", "group_size is 16, but affine has 32 or 64 or 128."),
        ('mode = "mxfp8"\nbits = 4', "bits is 4, but mxfp8 has 8."),
        ('mode = "int8"', "mode is 'int8'; it must be one of affine, mxfp4, mxfp8, nvfp4."),
        ("mode = 4", "mode is 4; it must be one of affine, mxfp4, mxfp8, nvfp4."),
        ("width = 4", "width is not a setting of a recipe."),
        ("layers = 4", "layers is no list of [[layers]] tables."),
        ("layers = [4]", "layers is no list of [[layers]] tables."),
        ("[[layers]]\nbits = 4", "layers[0].match is None, not a pattern of layer paths."),
        ("[[layers]]\nmatch = 4", "layers[0].match is 4, not a pattern of layer paths."),
        ('[[layers]]\nmatch = ""', "layers[0].match is '', not a pattern of layer paths."),
        (
            '[[layers]]\nmatch = "*"\nends = 0.6',
            "layers[0].ends is 0.6, not a number above 0 and up to 0.5.",
        ),
        (
            '[[layers]]\nmatch = "*"\nends = true',
            "layers[0].ends is True, not a number above 0 and up to 0.5.",
        ),
        (
            '[[layers]]\nmatch = "*"\nends = nan',
            "layers[0].ends is nan, not a number above 0 and up to 0.5.",
        ),
        ('[[layers]]\nmatch = "*"\nkeep = 1', "layers[0].keep is 1, not true or false."),
        (
            '[[layers]]\nmatch = "*"\nkeep = true\nbits = 4',
            "layers[0].bits makes no sense with keep.",
        ),
        ('[[layers]]\nmatch = "*"\nfirst = 1', "layers[0].first is not a setting of a recipe."),
        (
            '[[layers]]\nmatch = "a"\n[[layers]]\nmatch = "*"\nbits = 1',
            "layers[1].bits is 1, but affine has 2 or 3 or 4 or 5 or 6 or 8.",
        ),
    ],
)
def test_recipes_with_wrong_values(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConversionError) as caught:
        read_recipe(file)
    assert str(caught.value) == f"mine.toml: {message}"


def test_recipes_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    with pytest.raises(ConversionError) as caught:
        read_recipe(file)
    assert str(caught.value) == f"There is no file {file}."
    for content in (b"bits =", b"a = " + b"[" * 5000, b"bits = 4\nbits = 4"):
        file.write_bytes(content)
        with pytest.raises(ConversionError) as caught:
            read_recipe(file)
        assert str(caught.value).startswith(f"The recipe {file} is not valid TOML (")
    file.write_bytes(b"\xff")
    with pytest.raises(ConversionError) as caught:
        read_recipe(file)
    assert str(caught.value) == f"{file} is not UTF-8 text."
    with file.open("wb") as opened:
        opened.truncate(1_000_001)
    with pytest.raises(ConversionError) as caught:
        read_recipe(file)
    assert str(caught.value) == f"{file} is larger than 1.00 MB."
