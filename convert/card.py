"""The README.md and config.json of a converted model.

Knows what the Hub and mlx-lm expect in them; knows nothing of weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import phimlx
from convert.recipe import Quantization, Recipe
from phimlx.catalog import Model
from phimlx.models.config import hub_dialect

CARD = """\
---
{front_matter}
---

# {title}

{origin} converted to {target} with phimlx {version}: {form}.

```
phimlx chat --model {title}
```
"""
TARGETS = {"mlx": "MLX", "pt": "Hub layout"}
LIBRARIES = {"mlx": "mlx", "pt": "transformers"}


def model_config(
    config: Mapping[str, Any],
    known: Model | None,
    dtype: str | None,
    recipe: Recipe | None,
    layers: Mapping[str, Quantization | None],
) -> dict[str, Any]:
    """`config.json` in the Hub's dialect, which mlx-lm reads right, with MLX's quantization.

    Left out are `auto_map`, which names code that is not copied, and a `_name_or_path` that is not
    a published name, since it tells a path on somebody's machine.
    """
    converted = hub_dialect(config)
    for key in ("auto_map", "_name_or_path", "quantization", "quantization_config"):
        converted.pop(key, None)
    if known is not None:
        converted["_name_or_path"] = known.repo or known.alias
    if dtype is not None:
        converted["torch_dtype"] = dtype
    if recipe is not None:
        different = {
            path: asdict(chosen)
            for path, chosen in layers.items()
            if chosen is not None and chosen != recipe.default
        }
        converted["quantization"] = {**asdict(recipe.default), **different}
        converted["quantization_config"] = converted["quantization"]  # where the Hub looks for it
    return dict(sorted(converted.items()))


def model_card(
    title: str,
    source: Path,
    known: Model | None,
    dtype: str | None,
    recipe: Recipe | None,
    format: str,
) -> str:
    """`README.md`: what it was made from, and how.

    Args:
        format: of the weight files, "mlx" or "pt".
    """
    form = f"weights in {dtype or 'their own types'}"
    if recipe is not None:
        form = f"weights at {recipe.default}"
        if recipe.rules:
            form += f", others by the recipe {recipe.name}"
    about: dict[str, object] = {
        "library_name": LIBRARIES[format],
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "phimlx"] if format == "mlx" else ["phimlx"],
    }
    origin = "A model"
    if known is not None:
        about["license"] = known.licence.lower()
        origin = known.alias
    if known is not None and known.repo is not None:
        about["base_model"] = known.repo
        if recipe is not None:
            about["base_model_relation"] = "quantized"
        origin = f"[{known.repo}](https://huggingface.co/{known.repo})"
        if re.fullmatch("[0-9a-f]{40}", source.name) and source.parent.name == "snapshots":
            origin += f" at revision `{source.name}`"
    front_matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in about.items())
    return CARD.format(
        front_matter=front_matter,
        title=title,
        origin=origin,
        target=TARGETS[format],
        version=phimlx.__version__,
        form=form,
    )
