"""The catalogue against the published configs, and the names that lead to each model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

from phimlx import catalog
from phimlx.checkpoint.load import build_model
from phimlx.hub.layout import model_name
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from phimlx.models.phi3 import Phi3Config
from tests.bundled import present

PUBLISHED = {
    "phi-4": "phi-4",
    "phi-4-reasoning": "Phi-4-reasoning",
    "phi-4-reasoning-plus": "Phi-4-reasoning-plus",
    "phi-4-mini": "Phi-4-mini-instruct",
    "phi-4-mini-reasoning": "Phi-4-mini-reasoning",
    "phi-4-reasoning-vision": "Phi-4-reasoning-vision-15B",
}

# Of a tower of 1152 by 4304 its last layer, the norm after it, and a pooling head with a probe.
ATTENTION, MLP, NORM = 4 * (1152**2 + 1152), 2 * 1152 * 4304 + 4304 + 1152, 2 * 1152
UNUSED = {"phi-4-reasoning-vision": 2 * (ATTENTION + MLP) + 4 * NORM + 1152}


@pytest.mark.parametrize(("alias", "folder"), PUBLISHED.items())
def test_shapes_are_those_of_the_published_configs(data: Path, alias: str, folder: str) -> None:
    published = json.loads((data / "hf" / folder / "config.json").read_text())
    check_shape(alias, published, UNUSED.get(alias, 0))


@pytest.mark.parametrize(("alias", "folder"), PUBLISHED.items())
def test_sampling_is_that_of_the_published_generation_configs(
    data: Path, alias: str, folder: str
) -> None:
    file = present(data / "hf" / folder / "generation_config.json")
    published = json.loads(file.read_text())
    sampling = {k: published[k] for k in ("temperature", "top_p", "top_k") if k in published}
    model = catalog.find(alias)
    assert model is not None
    assert dict(model.sampling) == sampling
    assert model.reasoning == bool(sampling)


def test_nano_is_as_it_was_packaged() -> None:
    check_shape("nano", json.loads((NANO / "config.json").read_text()))
    multimodal = catalog.find("nano-multimodal")
    assert multimodal is not None
    assert multimodal.has_shape_of(json.loads((NANO_MULTIMODAL / "config.json").read_text()))


# What the published configs say, of the models whose files are not in the data.
PHI_3_MINI: dict[str, object] = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
PHI_3_MEDIUM = {
    **PHI_3_MINI, "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 10,
}  # fmt: skip
PHI_2: dict[str, object] = {
    "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 51200,
    "max_position_embeddings": 2048, "partial_rotary_factor": 0.4, "rope_theta": 10000.0,
    "rope_scaling": None, "layer_norm_eps": 1e-05, "hidden_act": "gelu_new",
    "qk_layernorm": False, "tie_word_embeddings": False, "resid_pdrop": 0.1,
}  # fmt: skip
PHI_1 = {
    **PHI_2, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "partial_rotary_factor": 0.5, "num_key_value_heads": None,
}  # fmt: skip


def long(config: dict[str, object], kind: str, head_dim: int) -> dict[str, object]:
    factors = [1.0 + i / 10 for i in range(head_dim // 2)]
    scaling = {"type": kind, "short_factor": factors, "long_factor": factors}
    more = {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": scaling}
    return {**config, **more}


@pytest.mark.parametrize(
    ("alias", "published"),
    [
        ("phi-3-mini", PHI_3_MINI),
        ("phi-3-mini-128k", long(PHI_3_MINI, "su", 96)),
        ("phi-3.5-mini", long(PHI_3_MINI, "longrope", 96)),
        ("phi-3-medium", PHI_3_MEDIUM),
        ("phi-3-medium-128k", long(PHI_3_MEDIUM, "su", 128)),
        ("phi-2", PHI_2),
        ("phi-1.5", PHI_1),
        ("phi-1", PHI_1),
    ],
)
def test_earlier_models_have_the_published_shapes(alias: str, published: dict[str, object]) -> None:
    check_shape(alias, published)


def check_shape(alias: str, published: dict[str, object], without: int = 0) -> None:
    """Compare the catalogue with a config; `without`: parameters that the model does without."""
    model = catalog.find(alias)
    assert model is not None
    config = build_model(published).config
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    ):
        assert getattr(model, key) == getattr(config, key), key
    assert model.context_length == config.max_position_embeddings
    assert model.tied == config.tie_word_embeddings
    assert model.longrope_step == (config.rope.original_max_position_embeddings or None)
    assert config.sliding_window != 2047 or model.context_length == 4096
    assert model.has_shape_of(published)
    parameters = dict(tree_flatten(build_model(published).parameters()))
    built = sum(array.size for array in parameters.values())
    assert model.parameters == built + without


def test_multimodal_has_minis_shape_and_the_published_sizes(data: Path) -> None:
    folder = data / "hf" / "Phi-4-multimodal-instruct"
    published = json.loads((folder / "config.json").read_text())
    model, mini = catalog.find("phi-4-multimodal"), catalog.find("phi-4-mini")
    assert model is not None
    assert mini is not None
    config = Phi3Config.from_dict(published)
    assert (model.num_hidden_layers, model.hidden_size) == (32, config.hidden_size)
    assert model.longrope_step == config.rope.original_max_position_embeddings
    assert model.has_shape_of(published)
    built = dict(tree_flatten(build_model(published).parameters()))
    # SigLIP's last layer, its closing norm and its attention pooling, which nothing uses.
    width, inner = 1152, 4304
    last = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    pooling = 4 * (width * width + width) + 3 * width + 2 * width * inner + inner + width
    total = sum(array.size for array in built.values()) + last + 2 * width + pooling
    assert model.parameters == total
    assert model.nbytes == 11_148_920_768
    assert model.whole_parameters == model.parameters - mini.parameters
    assert model.quantized_nbytes == mini.quantized_nbytes + 2 * model.whole_parameters


def test_published_sizes() -> None:
    mini, phi_4 = catalog.find("phi-4-mini"), catalog.find("phi-4")
    assert mini is not None
    assert phi_4 is not None
    assert (mini.parameters, phi_4.parameters) == (3_836_021_760, 14_659_507_200)
    assert (mini.nbytes, phi_4.nbytes) == (7_672_043_520, 29_319_014_400)
    assert (mini.quantized_nbytes, phi_4.quantized_nbytes) == (2_157_762_240, 8_245_972_800)


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("phi-4", "phi-4"),
        ("PHI-4", "phi-4"),
        (" phi4 ", "phi-4"),
        ("microsoft/phi-4", "phi-4"),
        ("mlx-community/phi-4-4bit", "phi-4"),
        ("phi-4-mini", "phi-4-mini"),
        ("Phi-4-mini-instruct", "phi-4-mini"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("MICROSOFT/phi-4-MINI-instruct", "phi-4-mini"),
        ("mlx-community/Phi-4-mini-instruct-4bit", "phi-4-mini"),
        ("Phi-4-mini-reasoning", "phi-4-mini-reasoning"),
        ("microsoft/Phi-4-reasoning", "phi-4-reasoning"),
        ("microsoft/Phi-4-reasoning-plus", "phi-4-reasoning-plus"),
        ("microsoft/Phi-4-multimodal-instruct", "phi-4-multimodal"),
        ("nano", "nano"),
        ("phi-4-nano", "nano"),
    ],
)
def test_names(name: str, alias: str) -> None:
    model = catalog.find(name)
    assert model is not None
    assert model.alias == alias


@pytest.mark.parametrize("name", ["", "phi", "phi-4-", "gpt-2", "someone/phi-4", "phi-3-small"])
def test_other_names_mean_nothing(name: str) -> None:
    assert catalog.find(name) is None


def test_no_name_means_two_models() -> None:
    names = [name.lower() for model in catalog.FAMILY for name in model.names]
    assert len(names) == len(set(names))


def test_the_default() -> None:
    assert catalog.DEFAULT.alias == "phi-4-mini"


MINI = {"model_type": "phi3", "num_hidden_layers": 32, "hidden_size": 3072, "vocab_size": 200_064}
PHI_4 = {"model_type": "phi3", "num_hidden_layers": 40, "hidden_size": 5120, "vocab_size": 100_352}


@pytest.mark.parametrize(
    ("config", "folder", "alias"),
    [
        ({**PHI_4, "_name_or_path": "microsoft/Phi-4-reasoning"}, "anything", "phi-4-reasoning"),
        (PHI_4, "/models/phi-4", "phi-4"),
        (PHI_4, "/models/Phi-4-reasoning-plus", "phi-4-reasoning-plus"),
        (PHI_4, "/models/Phi-4-reasoning-4bit", "phi-4-reasoning"),
        (PHI_4, "/hub/models--mlx-community--phi-4-8bit/snapshots/abc", "phi-4"),
        (MINI, "Phi-4-mini-instruct-MLX-4bit", "phi-4-mini"),
        (MINI, "phi-4-mini-q4-g32", "phi-4-mini"),
        (MINI, "Phi-4-mini-reasoning-bf16", "phi-4-mini-reasoning"),
        ({**MINI, "_name_or_path": "/tmp/Phi-4-mini-instruct/"}, "x", "phi-4-mini"),
        (MINI, "phi-4", None),  # the name of one, the shape of another
        ({**PHI_4, "vocab_size": 7}, "phi-4", None),
        ({**PHI_4, "model_type": "llama"}, "phi-4", None),
        (PHI_4, "my-tune", None),
        (PHI_4, "/phi-4/runs/my-tune", None),
        ({**PHI_4, "_name_or_path": ["phi-4"]}, "", None),
        ({}, "phi-4", None),
    ],
)
def test_local_folders(config: dict[str, object], folder: str, alias: str | None) -> None:
    model = catalog.by_config(config, model_name(Path(folder)))
    assert (model.alias if model else None) == alias


def test_importing_the_catalogue_is_cheap() -> None:
    code = (
        "import sys; before = set(sys.modules); from phimlx import catalog; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(run.stdout.split()) - {"phimlx"}
    assert imported <= set(sys.stdlib_module_names)
