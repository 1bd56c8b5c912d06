"""Records of architectures: each is true of its model, and nothing else knows what is in them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import convert
import phimlx
from phimlx.checkpoint.load import build_model
from phimlx.errors import GenerationError
from phimlx.models import registry
from phimlx.models.base import CausalLM
from phimlx.models.lora import LoRALinear
from phimlx.models.registry import ARCHITECTURES, Architecture

# A tiny checkpoint of each.
TINY = {
    "phi3": "tiny-phi4-mini",
    "phi": "tiny-phi2",
    "phi4flash": "tiny-phi4flash",
    "phi4mm": "tiny-phi4mm-remote",
    "phi4-siglip": "tiny-phi4-siglip",
}
PROJECTIONS = {path.rpartition(".")[2] for each in ARCHITECTURES for path in each.projections}
MODELS = Path(phimlx.__file__).parent / "models"


@pytest.fixture(params=ARCHITECTURES, ids=lambda each: each.model_type)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture
def model(architecture: Architecture, data: Path) -> CausalLM:
    folder = data / "tiny" / TINY[architecture.model_type]
    return build_model(json.loads((folder / "config.json").read_text()))


def test_no_type_means_two_architectures() -> None:
    types = [
        model_type
        for each in ARCHITECTURES
        for model_type in (each.model_type, *(dialect.model_type for dialect in each.dialects))
    ]
    assert len(types) == len(set(types))
    assert all(registry.find(model_type) is not None for model_type in types)
    assert registry.find("gpt2") is registry.find(None) is registry.find(["phi3"]) is None


def test_a_model_knows_its_record(architecture: Architecture, model: CausalLM) -> None:
    assert model.architecture is architecture
    assert (model.placeholders is not None) == architecture.takes_media
    if not architecture.takes_media:
        with pytest.raises(GenerationError, match="text only"):
            model(mx.array([[1, 2]]), input_image_embeds=mx.zeros((1, 1)))


def test_projections_are_those_that_a_layer_calls(
    architecture: Architecture, model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All linear layers of every decoder layer, in the order in which it calls them."""
    assert set(model.config.projection_shapes) == set(architecture.projections)
    ids = mx.array([[1, 2, 3]])
    x, forward = model.embed(ids), model.forward_pass(ids)
    for layer, shapes in zip(model.layers, model.config.layer_shapes, strict=True):
        modules = dict(layer.named_modules())
        linear = {path: modules[path] for path in shapes}
        linear = {p: m.base_layer if isinstance(m, LoRALinear) else m for p, m in linear.items()}
        kinds = {nn.Linear, *map(type, linear.values())}
        others = {p for p, m in modules.items() if type(m) in kinds and ".lora_" not in p}
        assert {p.removesuffix(".base_layer") for p in others} == set(shapes)
        assert {p: m.weight.shape[::-1] for p, m in linear.items()} == shapes
        called: list[str] = []
        with monkeypatch.context() as patch:
            for kind in kinds:
                patch.setattr(kind, "__call__", spied(kind.__call__, linear, called))
            x = layer(x, forward)
        assert tuple(called) == tuple(shapes)
        assert called == [path for path in architecture.projections if path in shapes]


def spied(
    call: Callable[..., mx.array], linear: dict[str, nn.Module], called: list[str]
) -> Callable[..., mx.array]:
    """Make a call that notes which of some layers it is of."""

    def spy(self: nn.Module, x: mx.array) -> mx.array:
        called.extend(path for path, module in linear.items() if module is self)
        return call(self, x)

    return spy


def test_every_tensor_of_a_text_model_has_a_name_in_gguf(
    architecture: Architecture, model: CausalLM
) -> None:
    from mlx.utils import tree_flatten

    from phimlx.checkpoint.gguf.names import gguf_name

    if architecture.gguf is None:
        # llama.cpp does not run these.
        assert architecture.model_type in ("phi4flash", "phi4mm", "phi4-siglip")
        return
    parameters = dict(tree_flatten(model.parameters()))
    names = [gguf_name(name, architecture.gguf) for name in parameters]
    assert len(names) == len(set(names))


def test_reading_records_imports_no_mlx() -> None:
    code = "import sys; from phimlx.models import registry; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def modules_beside() -> Iterator[Path]:
    """Every module of the project that is none of the models'."""
    for root in (Path(phimlx.__file__).parent, Path(convert.__file__).parent):
        yield from (file for file in sorted(root.rglob("*.py")) if MODELS not in file.parents)


@pytest.mark.parametrize("file", list(modules_beside()), ids=lambda file: "/".join(file.parts[-3:]))
def test_no_other_module_knows_an_architecture(file: Path) -> None:
    """None names a projection, a model's class or a model type, nor compares one."""
    tree = ast.parse(file.read_text("utf-8"))
    types = {each.model_type for each in ARCHITECTURES} - {"phi"}
    documented = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node in documented or file.name == "catalog.py":
                continue
            words = set(node.value.replace("*", "").split("."))
            assert not words & (PROJECTIONS | types), node.value
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert not name.startswith(("Phi3", "Phi4MM", "Phi4Siglip", "PhiFor", "PhiConfig")), (
                name
            )
        if isinstance(node, ast.Compare):
            assert "model_type" not in ast.unparse(node) or file.name == "catalog.py"
