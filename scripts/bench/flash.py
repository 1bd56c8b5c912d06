"""What the design of Phi-4-mini-flash-reasoning saves: work of a prompt, and bytes of its cache.

    python scripts/bench/flash.py [--tokens 256] [--repeats 3]

Counted at the published shape: the multiplications of weights that a token of a prompt takes, with
all layers and with those alone whose output is wanted; and what a cache of 32,768 tokens holds,
filled as a prompt fills it, beside phi-4-mini's. Measured on a model of the same proportions that
fits any machine: a prompt's time both ways, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx import catalog
from phimlx.checkpoint.load import build_model
from phimlx.machine.memory import cache_bytes, cache_bytes_per_token
from phimlx.models.base import CausalLM
from phimlx.models.phi4flash.cache import KEPT, FlashStore, State
from phimlx.models.phi4flash.config import FULL, MAMBA, WINDOW, Phi4FlashConfig

PUBLISHED: dict[str, Any] = {
    "model_type": "phi4flash", "vocab_size": 200064, "hidden_size": 2560,
    "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 40,
    "num_key_value_heads": 20, "sliding_window": 512, "max_position_embeddings": 262144,
    "layer_norm_eps": 1e-5, "mb_per_layer": 2, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {
    **PUBLISHED, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "sliding_window": 128,
}  # fmt: skip
CONTEXT, PIECE = 32_768, 2048
LIMITS = {"work": 0.6, "cache": 0.15}


def work(config: Phi4FlashConfig) -> float:
    """Work of a prompt's token, over that with all layers: weights multiplied, and attention read.

    Of the full layer a prompt takes keys and values alone.
    """
    sizes = [sum(a * b for a, b in shapes.values()) for shapes in config.layer_shapes]
    full = config.kinds.index(FULL)
    keys = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    return (sum(sizes[:full]) + keys) / sum(sizes)


def filled(config: Phi4FlashConfig) -> FlashStore:
    """Make the store that a prompt of `CONTEXT` tokens leaves, and a token of the reply behind."""
    store = FlashStore(config)
    rows = (1, config.num_key_value_heads)
    pieces = [*range(0, CONTEXT, PIECE), CONTEXT]
    for begin, end in zip(pieces, [*pieces[1:], CONTEXT + 1], strict=True):
        store.reserve(end, begin)
        steps = min(KEPT, end - begin)
        for layer, kind in enumerate(config.kinds):
            if kind in (WINDOW, FULL):
                new = [mx.zeros((*rows, end - begin, config.head_dim), mx.bfloat16)] * 2
                store.append(layer, begin, *new)
            elif kind == MAMBA:
                columns = mx.zeros((1, config.d_conv - 1 + steps, config.d_inner), mx.bfloat16)
                states = [mx.zeros((1, config.d_inner, config.d_state)) for _ in range(2)]
                inputs = [mx.zeros((1, steps, config.d_inner)) for _ in range(2)]
                b, a = mx.zeros((1, steps, config.d_state)), states[0][0]
                store.put_state(layer, State(columns, states[0], *inputs, b, a, states[1]), end)
        mx.eval(store.arrays)
        if end <= CONTEXT:
            store.mark()
    return store


def seconds(model: CausalLM, ids: mx.array, outputs: int | None) -> float:
    begin = time.perf_counter()
    mx.eval(model.hidden_states(ids, model.make_cache(), outputs=outputs))
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    config = Phi4FlashConfig.from_dict(PUBLISHED)
    counted = work(config)
    print(f"work of a prompt's token, counted:   {counted:.3f} x of all layers")

    mx.random.seed(0)
    model = build_model(SMALL)
    weights: Any = tree_flatten(model.parameters())
    model.load_weights([(name, mx.random.normal(a.shape) * 0.05) for name, a in weights])
    model.eval()
    ids = mx.random.randint(0, 512, (1, options.tokens))
    seconds(model, ids, 1)
    pairs = [(seconds(model, ids, 1), seconds(model, ids, None)) for _ in range(options.repeats)]
    ratio = statistics.median(one / all_ for one, all_ in pairs)
    mine, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"time of {options.tokens} tokens, small model:    {ratio:.3f} x of all layers "
        f"({mine:.2f} s, {whole:.2f} s; counted {work(model.config):.3f})"  # type: ignore[arg-type]
    )

    mini = catalog.find("phi-4-mini")
    assert mini is not None
    theirs = CONTEXT * cache_bytes_per_token(mini)
    held = sum(array.nbytes for array in filled(config).arrays)
    share = held / theirs
    print(
        f"cache of {CONTEXT:,} tokens:              {share:.3f} x of phi-4-mini's "
        f"({held / 1e6:.0f} MB, {theirs / 1e6:.0f} MB; forecast without earlier places "
        f"{cache_bytes(config, CONTEXT) / 1e6:.0f} MB)"
    )
    return int(counted > LIMITS["work"] or share > LIMITS["cache"])


if __name__ == "__main__":
    sys.exit(main())
