"""Every form of PEFT adapter: the logits that PEFT makes of it, here, fused and written again."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_unflatten

from convert import convert
from phimlx.adapters.adapter import Adapter
from phimlx.adapters.attach import load_adapter
from phimlx.adapters.peft import write_peft
from phimlx.adapters.read import read_adapter
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import CheckpointError
from phimlx.models.base import CausalLM
from phimlx.models.lora import EmbeddingLoRA, LoRA, dequantized_weight
from phimlx.models.token_rows import TokenRows
from tests.convert.tiny import MINI, PHI_4, write_model

GOLDENS = Path(__file__).parents[1] / "goldens" / "peft-forms"
MODELS = ("plain", "tied", "phi")
FORMS = sorted(
    folder.name for folder in GOLDENS.iterdir() if folder.is_dir() and folder.name not in MODELS
)
TOLERANCE = 3e-5  # of the largest logit; most are ten times nearer


def golden(name: str) -> mx.array:
    arrays = mx.load(str(GOLDENS / "logits.safetensors"))
    assert isinstance(arrays, dict)
    return arrays[name]


def model_of(form: str) -> str:
    return next((name for name in MODELS if form.startswith(f"{name}-")), "plain")


def logits(form: str, adapter: Adapter | Path) -> mx.array:
    model = load_model(Checkpoint(GOLDENS / model_of(form)))
    load_adapter(model, adapter)
    return model(golden("input_ids"))


def distance(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_peft(form: str) -> None:
    expected = golden(form)
    found = logits(form, GOLDENS / form)
    assert found.shape == expected.shape
    assert distance(found, expected) < TOLERANCE
    shared = min(expected.shape[-1], 40)
    assert distance(golden(model_of(form))[..., :shared], expected[..., :shared]) > 0.1


RESIZED = [form for form in FORMS if form.endswith(("grown", "shrunk"))]


@pytest.mark.parametrize("form", [form for form in FORMS if form not in RESIZED])
def test_fused_logits_are_those_of_peft(form: str, tmp_path: Path) -> None:
    if form == "lora-bias":
        with pytest.raises(CheckpointError, match=r"adds a bias to .*, which has none"):
            convert(GOLDENS / "plain", tmp_path / "out", adapter=GOLDENS / form)
        return
    convert(GOLDENS / model_of(form), tmp_path / "out", adapter=GOLDENS / form)
    fused = load_model(Checkpoint(tmp_path / "out"))
    assert distance(fused(golden("input_ids")), golden(form)) < TOLERANCE


@pytest.mark.parametrize("form", RESIZED)
def test_another_vocabulary_is_not_fused(form: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(GOLDENS / model_of(form), tmp_path / "out", adapter=GOLDENS / form)
    tokens = golden(form).shape[-1]
    assert str(caught.value) == (
        f"The adapter gives the model {tokens} tokens instead of 40, which fusing leaves as they "
        "are."
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_goes_out_is_what_peft_wrote(form: str, tmp_path: Path) -> None:
    write_peft(tmp_path, read_adapter(GOLDENS / form))
    ours, theirs = (
        mx.load(str(folder / "adapter_model.safetensors")) for folder in (tmp_path, GOLDENS / form)
    )
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[key], theirs[key]) for key in theirs)
    assert distance(logits(form, tmp_path), golden(form)) < TOLERANCE


def random(*shape: int) -> mx.array:
    return 0.3 * mx.random.normal(shape, key=mx.random.key(sum(shape)))


EMBEDDING, HEAD, O_PROJ = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.o_proj"
LAYER = {O_PROJ: LoRA(random(64, 2), random(2, 64), 1.5)}
CHANGES = {
    "embedding": Adapter({**LAYER, EMBEDDING: EmbeddingLoRA(random(48, 3), random(3, 64), 2.0)}),
    "embedding, tied or not": Adapter(
        {**LAYER, EMBEDDING: EmbeddingLoRA(random(48, 3), random(3, 64), 2.0)}, tied=False
    ),
    "columns": Adapter(
        {
            O_PROJ: LoRA(random(64, 2), random(2, 64), 1.5, random(64) + 1),
            EMBEDDING: EmbeddingLoRA(random(48, 3), random(3, 64), 2.0, random(64) + 1),
        },
        tied=False,
    ),
    "head": Adapter({HEAD: LoRA(random(64, 3), random(3, 48), 2.0, bias=random(48))}, tied=False),
    "rows": Adapter(LAYER, rows={EMBEDDING: TokenRows((5, 47, 0), random(3, 64))}),
    "rows of both": Adapter(
        LAYER,
        rows={
            EMBEDDING: TokenRows((5, 47), random(2, 64)),
            HEAD: TokenRows((9, 5, 1), random(3, 64)),
        },
    ),
    "saved": Adapter(LAYER, {f"{EMBEDDING}.weight": random(48, 64)}, tied=False),
    "copied": Adapter(
        LAYER,
        {f"{HEAD}.weight": random(48, 64), "model.layers.1.mlp.down_proj.weight": random(64, 96)},
        copies=frozenset({f"{HEAD}.weight"}),
        tied=False,
    ),
}


def tiny(folder: Path, quantized: bool) -> CausalLM:
    model = load_model(Checkpoint(folder))
    nn.quantize(model, group_size=32, bits=4)
    if not quantized:
        for path, module in model.named_modules():
            if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
                embedding = isinstance(module, nn.QuantizedEmbedding)
                plain = nn.Embedding(1, 1) if embedding else nn.Linear(1, 1, bias=False)
                plain.weight = dequantized_weight(module)
                model.update_modules(tree_unflatten([(path, plain)]))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_quantized_weights_take_what_their_values_take(
    name: str, tied: bool, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, MINI if tied else PHI_4)
    ids = mx.array([[5, 47, 0, 9, 1, 33, 12, 5]])
    found = []
    for quantized in (False, True):
        model = tiny(folder, quantized)
        before = model(ids)
        load_adapter(model, CHANGES[name])
        found.append(model(ids))
        assert distance(before, found[-1]) > 0.1
        assert model.config.tie_word_embeddings == (tied and name in ("saved",))
    assert distance(*found) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_was_taken_out_of_weights_is_not_told_by_quantized_ones(
    start: str, tmp_path: Path
) -> None:
    model = tiny(write_model(tmp_path), quantized=True)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, Adapter(LAYER, start=start))
    assert str(caught.value) == (
        f"The adapter belongs to what {start} left of the original weights, and {O_PROJ} is "
        "quantized here."
    )
    assert caught.value.hint is not None
    assert "path_initial_model_for_weight_conversion" in caught.value.hint
