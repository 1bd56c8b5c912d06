"""Pruned folders in other programs: in mlx-lm itself, in transformers by what it once said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from convert.prune.plan import PruningPlan
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from tests.convert.pruned import CASES, GOLDENS

GOLDEN = GOLDENS / "prune-folders.safetensors"
ARRAYS = load_file(GOLDEN)

# mlx-lm turns by LongRoPE's long factors at every length, and so says something else of the whole
# model too.
OTHERWISE = {"mini, fewer layers", "mini, narrower"}


def by_mlx_lm(folder: Path) -> Any:
    from mlx_lm.utils import load_model as load

    return load(folder)[0]


def told(name: str) -> dict[str, Any]:
    """What transformers found in a folder."""
    with safe_open(str(GOLDEN), "numpy") as file:
        found: dict[str, Any] = json.loads(file.metadata()[name])
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_loads_elsewhere_to_the_same_logits(
    name: str, data: Path, tmp_path: Path
) -> None:
    after, plan = CASES[name].write(data / "tiny", tmp_path / "out")
    found = told(name)
    # The same folder as transformers loaded, but for the numbers, which its logits tell.
    assert json.loads((after.folder / "config.json").read_text()) == found["config"]
    stored = mx.load(str(after.folder / "model.safetensors"))
    assert isinstance(stored, dict)
    assert {key: list(each.shape) for key, each in stored.items()} == found["tensors"]
    assert ("transformers" in plan.lost.programs) == ("refused" in found)
    if "refused" in found:
        assert "short_factor field must have length 48, got 12" in found["refused"]
        with pytest.raises(ValueError, match="cannot be broadcast"):
            by_mlx_lm(after.folder)
        return
    tokens = mx.array(ARRAYS[f"{name}.tokens"])
    logits = load_model(after)(tokens)
    np.testing.assert_allclose(np.array(logits)[:, ::8], ARRAYS[f"{name}.logits"], atol=1e-4)
    if "mlx-lm" in plan.lost.programs:
        with pytest.raises(ValueError, match="Expected shape"):
            by_mlx_lm(after.folder)
    else:
        theirs = by_mlx_lm(after.folder)(tokens)
        assert bool(mx.allclose(theirs, logits, atol=1e-4)) == (name not in OTHERWISE)


@pytest.mark.parametrize(
    ("model", "wanted", "warning"),
    [
        ("tiny-phi4", {"heads": 1}, None),
        ("tiny-phi4-mini", {"mlp": 0.5}, None),
        ("tiny-phi2", {"heads": 2}, "What comes out does not load in mlx-lm: hidden_size / "
         "num_attention_heads is taken for the size of a head, which it is not with fewer heads."),
        ("nano", {"heads": 2}, "What comes out does not load in mlx-lm and transformers: "
         "hidden_size / num_attention_heads is taken for the size of a head, which it is not with "
         "fewer heads."),
        ("tiny-phi4-siglip", {"mlp": 0.5}, "What comes out does not load in transformers: it runs "
         "phi4-siglip by code that comes with the published model and is not copied."),
    ],
)  # fmt: skip
def test_what_will_not_load_it_is_said_before(
    model: str, wanted: dict[str, Any], warning: str | None, data: Path
) -> None:
    from phimlx.hub.resolve import NANO

    folder = NANO if model == "nano" else data / "tiny" / model
    plan = PruningPlan.of(Checkpoint(folder), None, wanted)
    assert plan.lost.warning == warning
