"""Primitives of a decoder layer in one pass, phimlx beside mlx-lm's phi3 on the same folder.

    python scripts/bench/operations.py [--tokens 1 512] [--list]

What is counted are the nodes of MLX's own graph export, with compiled functions on, of a pass over
one token (a decode step) and over a piece of a prompt, behind a prompt that the cache holds. A
layer's are the difference between models of two layers and of one. On the CPU backend `mx.fast`'s
norms, attention and rope are built of several primitives; in the second count each is one, as it is
one kernel on a GPU. Views (reshapes, slices, transposes) move no data and are left out of the
third, which is nearest to the kernels that a GPU runs. Nothing is timed. Needs mlx-lm.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.models import rope

PROMPT = 8  # tokens that the cache holds
COMMON = {
    "model_type": "phi3", "vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "eos_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "phi-4": {
        **COMMON, "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
        "rope_theta": 250000.0, "rope_scaling": None, "tie_word_embeddings": False,
    },
    "phi-4-mini": {
        **COMMON, "hidden_size": 384, "num_attention_heads": 3, "num_key_value_heads": 1,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
        "original_max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
        },
    },
}  # fmt: skip
"""Heads of 128 channels that turn wholly, and in part by LongRoPE, as the published models' do."""

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "CustomTransforms", "Depends", "ExpandDims",
    "Flatten", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip

Pass = Callable[[int], mx.array]
"""Builds the graph of a pass over so many tokens, and returns its logits."""


def primitives(*outputs: mx.array) -> Counter[str]:
    """Count the primitives that outputs are still to be computed by.

    A concatenation counts once for each array that it copies.
    """
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    text = dot.getvalue()
    inputs = Counter(re.findall(r'^".*" -> (\d+)$', text, re.MULTILINE))
    counts = Counter[str]()
    for number, name in re.findall(r'(\d+) \[label ="([^"]*)", shape=rectangle\]', text):
        counts[name] += inputs[number] if name == "Concatenate" else 1
    return counts


@contextmanager
def compiled_functions() -> Iterator[None]:
    """Compile what phimlx compiles for a GPU only; graphs are built, not computed."""
    with mock.patch.object(rope, "on_gpu", return_value=True):
        yield


@contextmanager
def fast_as_one() -> Iterator[None]:
    """Make each function of `mx.fast` one primitive that stands for its kernel."""

    def norm(x: mx.array, weight: mx.array, *_: Any) -> mx.array:
        return mx.depends([mx.abs(x)], [weight])[0]

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        return mx.depends([mx.abs(queries)], [keys, values])[0]

    def turned(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.abs(x)

    with (
        mock.patch.object(mx.fast, "rms_norm", norm),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
        mock.patch.object(mx.fast, "rope", turned),
    ):
        yield


def ours(folder: Path) -> Pass:
    model = load_model(Checkpoint(folder))

    def build(tokens: int) -> mx.array:
        cache = model.make_cache()
        mx.eval(model(mx.arange(PROMPT)[None], cache), cache.state)
        with compiled_functions():
            return model(mx.zeros((1, tokens), mx.int32), cache)

    return build


def theirs(folder: Path) -> Pass:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as load_theirs

    model, _ = load_theirs(folder)

    def build(tokens: int) -> mx.array:
        cache = make_prompt_cache(model)
        mx.disable_compile()  # which would start a C++ compiler here
        mx.eval(model(mx.arange(PROMPT)[None], cache), [layer.state for layer in cache])
        mx.enable_compile()
        return model(mx.zeros((1, tokens), mx.int32), cache)

    return build


SIDES = {"phimlx": ours, "mlx-lm": theirs}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(build_model(config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def per_layer(config: dict[str, Any], tokens: int) -> dict[str, Counter[str]]:
    """Count what a layer adds to a pass, by side."""
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        for layers in (1, 2):
            folder = Path(name) / str(layers)
            write_model(folder, {**config, "num_hidden_layers": layers})
            for side, prepare in SIDES.items():
                found = primitives(prepare(folder)(tokens))
                counts[side] = found if layers == 1 else found - counts[side]
    return counts


def kernels(counts: Counter[str]) -> int:
    return sum(count for name, count in counts.items() if name not in VIEWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128], help="of a pass")
    parser.add_argument("--list", action="store_true", help="name the primitives")
    arguments = parser.parse_args()
    print(f"{'a layer of':12} {'tokens':>6}  {'':8} {'primitives':>10} {'fast as one':>11} kernels")
    for shape, config in SHAPES.items():
        for tokens in arguments.tokens:
            whole = per_layer(config, tokens)
            with fast_as_one():
                short = per_layer(config, tokens)
            for side in SIDES:
                print(
                    f"{shape:12} {tokens:6}  {side:8} {whole[side].total():10} "
                    f"{short[side].total():11} {kernels(short[side]):7}"
                )
                if arguments.list:
                    print(
                        "   ", ", ".join(f"{n} {name}" for name, n in sorted(short[side].items()))
                    )


if __name__ == "__main__":
    main()
