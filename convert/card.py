"""The README.md and config.json of a converted model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import phimlx
from convert.quantize.recipe import UNIFORM, Quantization, Recipe
from phimlx.catalog import Model
from phimlx.hub.destination import origin_of
from phimlx.models.config import hub_dialect
from phimlx.models.registry import part_of
from phimlx.models.rope_scaling import Scaling

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
    layers: Mapping[str, Quantization | None] = MappingProxyType({}),
    task: str = "text-generation",
) -> str:
    """`README.md`: what it was made from, and how.

    Args:
        source: the folder that it was made from, which may tell repository and revision.
        format: of the weight files, "mlx" or "pt".
        layers: what became of each layer that can be quantized.
        task: of the model, in the Hub's terms.
    """
    form = f"weights in {dtype or 'their own types'}"
    if recipe is not None:
        form = f"weights at {recipe.default}"
        if recipe.name != UNIFORM:
            form += f", others by the recipe {recipe.name}"
    about: dict[str, object] = {
        "library_name": LIBRARIES[format],
        "pipeline_tag": task,
        "tags": ["mlx", "phimlx"] if format == "mlx" else ["phimlx"],
    }
    repository, revision = origin_of(source) or (None, None)
    base = repository
    if known is not None:
        about["license"] = known.licence.lower()
        base = known.repo
        repository = repository or base
    if base is not None:
        about["base_model"] = base
        if recipe is not None:
            about["base_model_relation"] = "quantized"
    origin = known.alias if known is not None else "A model"
    if repository is not None:
        origin = f"[{repository}](https://huggingface.co/{repository})"
    if revision is not None:
        origin += f" at revision `{revision}`"
    front_matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in about.items())
    text = CARD.format(
        front_matter=front_matter,
        title=title,
        origin=origin,
        target=TARGETS[format],
        version=phimlx.__version__,
        form=form,
    )
    if recipe is not None and (exceptions := _exceptions(recipe, layers)):
        rows = [("Layers", "Weights"), ("---", "---"), *exceptions]
        rows.append(("all others", str(recipe.default)))
        text += "\n## Layers\n\n" + "".join(f"| {left} | {right} |\n" for left, right in rows)
    return text


def scaling_markdown(scaling: Scaling) -> str:
    """Say that a model is not as it was published: its rotary embedding is scaled."""
    return (
        f"\n## Context\n\n{scaling.kind} scaling of {scaling.original:,} tokens by "
        f"{scaling.factor:g} (`rope_scaling` in config.json), which the published model has not.\n"
    )


def _exceptions(recipe: Recipe, layers: Mapping[str, Quantization | None]) -> list[tuple[str, str]]:
    """The layers that have another form than most, all of a kind together, and that form."""
    numbers: dict[tuple[str, Quantization | None], list[int]] = {}
    blocks = set()
    beside = Counter((part_of(path), chosen) for path, chosen in layers.items())
    for path, chosen in layers.items():
        if part_of(path) is not None:
            continue
        found = re.search(r"\blayers\.(\d+)\.(.+)", path)
        kind = (found[2] if found else path).removesuffix(".base_layer")
        blocks |= {int(found[1])} if found else set()
        if chosen != recipe.default:
            numbers.setdefault((kind, chosen), []).extend([int(found[1])] if found else [])
    rows = []
    for (kind, chosen), own in numbers.items():
        where = ""
        if own:
            every = len(own) == len(blocks)
            where = " of every block" if every else f" of the blocks {_ranges(sorted(own))}"
        rows.append((f"`{kind}`{where}", "not quantized" if chosen is None else str(chosen)))
    for (part, chosen), count in beside.items():
        if part is not None and chosen != recipe.default:
            form = "not quantized" if chosen is None else str(chosen)
            rows.append((f"{part}, {count} layers", form))
    return rows


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
