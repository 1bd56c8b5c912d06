"""phi-4-nano rounded and calibrated, at equal size: KL divergence and answers on unseen text.

    python -P scripts/bench/calibrated.py [--bits 4 3] [--methods rtn gptq dwq sensitivity]
        [--steps 128] [--learning-rate 1e-4] [--samples 64] [--answers 60]

Calibrated on every second held-out conversation, measured on the others: KL from the bfloat16 model
in windows up to and past the LongRoPE step, and greedy answers. By sensitivity, the fewest bits of
a layer are one less, and the size is that of the others. Needs mlx-lm, and -P,
since a bench beside this one is called convert, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import phimlx
from convert import CalibrationSettings, ConversionResult, Quantization, convert
from convert.measure.report import measure
from phimlx.hub.resolve import NANO
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

TOKENS = 2048  # that are measured


def render(rows: list[dict[str, Any]]) -> str:
    """Conversations with their answers, one after the other."""
    tokenizer = Tokenizer.load(NANO)
    template = ChatTemplate.load(NANO, tokenizer)
    return "".join(
        tokenizer.decode(
            template.encode(
                [*row["messages"], {"role": "assistant", "content": row["answer"]}],
                row.get("tools"),
                add_generation_prompt=False,
            )
        )
        for row in rows
    )


def answered(folder: Path, rows: list[dict[str, Any]]) -> int:
    """How many conversations end with exactly the right answer; those with tools are left out."""
    phi = phimlx.load(folder, "float32")
    return sum(
        phi.generate(row["messages"], max_tokens=48, temperature=0).text.strip() == row["answer"]
        for row in rows
    )


def make(
    method: str, bits: int, out: Path, text: str, settings: argparse.Namespace
) -> ConversionResult:
    if method == "rtn":
        return convert(NANO, out, Quantization(64, bits))
    common: dict[str, Any] = {"samples": settings.samples, "length": 128}
    if method == "sensitivity":
        target = convert(NANO, out.with_name("size"), Quantization(64, bits)).bits_per_weight
        learning = CalibrationSettings(method, text, target_bits=target, **common)
        return convert(NANO, out, Quantization(64, bits - 1), calibration=learning)
    if method == "dwq":
        common |= {"steps": settings.steps, "learning_rate": settings.learning_rate}
    return convert(
        NANO, out, Quantization(64, bits), calibration=CalibrationSettings(method, text, **common)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument(
        "--methods", nargs="+", default=["rtn", "gptq", "dwq", "sensitivity"], metavar="METHOD"
    )
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--answers", type=int, default=60)
    settings = parser.parse_args()
    lines = (NANO / "heldout.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    text, unseen = render(rows[::2]), rows[1::2]
    asked = [row for row in unseen if not row.get("tools")][: settings.answers]
    print(f"{'bits':>4}  {'method':12} {'bpw':>5}  {'KL':>7}  {'KL past step':>12}  answers  time")
    whole = f"{answered(NANO, asked)}/{len(asked)}" if asked else "-"
    print(f"{16:4}  {'(original)':12} {16:5.2f}  {0:7.4f}  {0:12.4f}  {whole:>7}", flush=True)
    for bits in settings.bits:
        for method in settings.methods:
            with tempfile.TemporaryDirectory() as name:
                out, start = Path(name) / method, time.perf_counter()
                made = make(method, bits, out, text, settings)
                seconds = time.perf_counter() - start
                short, past = measure(NANO, out, render(unseen), TOKENS).agreements
                right = f"{answered(out, asked)}/{len(asked)}" if asked else "-"
            print(
                f"{bits:4}  {method:12} {made.bits_per_weight:5.2f}  {short.divergence:7.4f}  "
                f"{past.divergence:12.4f}  {right:>7}  {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
