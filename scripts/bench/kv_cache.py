"""What quantized keys and values save, and what they cost in quality.

    python scripts/bench/kv_cache.py [memory|quality] [--tokens 32768] [--layers 16]

Memory: a random model with Phi-4-mini's heads (24 of queries, 8 of keys and values, 128 channels)
and little else, bfloat16. Peaks are those of a whole prompt on a GPU. A CPU would take hours for
that, and its attention is not fused and holds all scores of a piece; so there keys and values of
all but the end of the prompt are random numbers, and the peak is that of its last few tokens.

Quality: phi-4-nano on its held-out conversations and on English prose, on both sides of its
LongRoPE step, every token given: the divergence of the next token's distribution from that with an
unquantized cache, and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

import phimlx
from phimlx.generation.prefill import prefill
from phimlx.hub.resolve import NANO
from phimlx.machine.device import on_gpu, prefill_tokens
from phimlx.machine.reductions import log_softmax
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.models.cache.quantized import FEW
from phimlx.models.phi3 import Phi3Config, Phi3ForCausalLM
from phimlx.sizes import size_text
from phimlx.terminal.output import Output

KINDS = (None, 8, 4)  # bits
PIECE = FEW + 1  # tokens at the end of a prompt on a CPU, which attend to what is dequantized
ROWS = 20  # conversations on either side of the step
PROSE = Path(phimlx.__file__).parent / "assets" / "calibration.txt"


def synthetic(layers: int, tokens: int) -> CausalLM:
    mx.random.seed(0)
    config = {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": layers,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 512,
        "max_position_embeddings": tokens, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    }  # fmt: skip
    model = Phi3ForCausalLM(Phi3Config.from_dict(config))
    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def peak(model: CausalLM, tokens: int, kv_bits: int | None) -> tuple[int, int]:
    """Bytes of the cache of a prompt, and at most over the weights while it is read."""
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    ids = np.random.default_rng(0).integers(0, 512, (1, tokens), np.int32)
    cache = model.make_cache(tokens, kv_bits=kv_bits)
    if not on_gpu():
        fill(cache, tokens - PIECE, kv_bits, model.config.num_hidden_layers)
        ids = ids[:, -PIECE:]
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    for hidden in prefill(model, ids, cache):
        mx.eval(hidden, cache.state)
    return cache.nbytes, mx.get_peak_memory() - weights


def fill(cache: Cache, tokens: int, kv_bits: int | None, layers: int) -> None:
    """Fill a cache with random keys and values."""
    cache.extend(mx.zeros((1, tokens), mx.int32))
    new = mx.random.normal((1, 8, tokens, 128)).astype(mx.bfloat16)
    parts = [new, new] if kv_bits is None else [*mx.quantize(new, 64, kv_bits)] * 2
    for layer in range(layers):
        cache.store.write(layer, 0, parts)
        mx.eval(cache.state)
    cache.commit()


def memory(output: Output, layers: int, tokens: int) -> None:
    model = synthetic(layers, tokens)
    found = {bits: peak(model, tokens, bits) for bits in KINDS}
    cache, whole = found[None]
    one = 2 * 8 * tokens * 128 * 2  # keys and values of a layer, dequantized
    rows = []
    for bits, (held, most) in found.items():
        forecast = held + one if bits else held
        sizes = ((held, cache), (forecast, cache), (most, whole))
        cells = [cell for part, of in sizes for cell in (size_text(part), f"{part / of:.2f} ×")]
        rows.append((bits or "none", *cells))
    piece = prefill_tokens() if on_gpu() else PIECE
    output.text(f"{tokens:,} tokens, {layers} layers, {piece} tokens at a time", "bold")
    head = ("cache", "and a layer dequantized", "peak over the weights, measured")
    output.table(["bits", *(cell for name in head for cell in (name, ""))], rows)
    if not on_gpu():
        scores = 24 * prefill_tokens() * tokens * 2
        output.text(
            "On a CPU the measured peak says little: its dequantization is not fused, and unpacks "
            "through several arrays of 4 bytes a number; nor is its attention, whose scores for "
            f"{prefill_tokens()} tokens would take {size_text(scores)} in any kind of cache. The "
            "largest temporary of fused kernels is a layer's dequantized keys and values, "
            f"{size_text(one)}, at any number of layers."
        )


def conversations(phi: phimlx.Phi, long: bool) -> Iterator[list[int]]:
    step = phi.model.config.rope.original_max_position_embeddings
    for line in (NANO / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        said = [*row["messages"], {"role": "assistant", "content": row["answer"]}]
        try:
            ids = phi.template.encode(said, None)
        except phimlx.PhimlxError:
            continue
        if (len(ids) > step) == long:
            yield ids


def distributions(model: CausalLM, ids: list[int], kv_bits: int | None) -> mx.array:
    """Log-probabilities of each next token, `[length, vocab]`."""
    cache = model.make_cache(len(ids), kv_bits=kv_bits)
    hidden = mx.concatenate(list(prefill(model, np.array([ids]), cache)), axis=1)
    return log_softmax(model.head(hidden[0]))


def compare(model: CausalLM, rows: list[list[int]]) -> dict[int, tuple[float, float]]:
    """By bits, the mean divergence in nats and the share of the same likeliest tokens."""
    found: dict[int, list[tuple[float, float]]] = {8: [], 4: []}
    for ids in rows:
        plain = distributions(model, ids, None)
        for bits, pairs in found.items():
            other = distributions(model, ids, bits)
            divergence = (mx.exp(plain) * (plain - other)).sum(axis=-1)
            same = plain.argmax(axis=-1) == other.argmax(axis=-1)
            pairs += zip(divergence.tolist(), same.tolist(), strict=True)  # type: ignore[arg-type]
    return {
        bits: (statistics.fmean(kl for kl, _ in pairs), statistics.fmean(same for _, same in pairs))
        for bits, pairs in found.items()
    }


def quality(output: Output) -> None:
    phi = phimlx.load("nano", dtype="float32")
    step = phi.model.config.rope.original_max_position_embeddings
    prose = phi.encode(PROSE.read_text(encoding="utf-8"), raw=True)

    def cut(length: int, count: int) -> list[list[int]]:
        return [prose[begin : begin + length] for begin in range(0, length * count, length)]

    texts = {
        f"conversations up to {step}": list(islice(conversations(phi, False), ROWS)),
        f"conversations beyond {step}": list(islice(conversations(phi, True), ROWS)),
        f"prose, {step} tokens": cut(step, 12),
        "prose, 1,024 tokens": cut(1024, 2),
    }
    rows = []
    for name, given in texts.items():
        count = f"{sum(map(len, given)):,}"
        for bits, (divergence, top1) in compare(phi.model, given).items():
            rows.append((name, count, bits, f"{divergence:.1e}", f"{top1:.2%}"))
    output.text("phi-4-nano, against its unquantized cache, float32", "bold")
    output.table(["text", "tokens", "bits", "KL (nats)", "same top-1"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("memory", "quality"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    output = Output()
    if options.what != "quality":
        memory(output, options.layers, options.tokens)
        output.text()
    if options.what != "memory":
        quality(output)


if __name__ == "__main__":
    main()
