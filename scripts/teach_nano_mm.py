"""Teaches phi-4-nano-multimodal a new shape and a new spoken word, by the command line alone.

    python scripts/teach_nano_mm.py [--bits 4] [--folder FOLDER]

Draws pictures of a shape that the model has no name for and lets espeak-ng say a word that it never
heard, each among what it knows; trains its vision and its speech adapter on them with `phimlx
train`, and asks with `phimlx evaluate` about pictures and sounds of neither, before and after. With
`--bits 4` the model is converted first. It ends with an error where less than `AFTER` is right.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile  # type: ignore[import-untyped]
import soxr  # type: ignore[import-untyped]
from PIL import Image, ImageDraw

MODEL = "nano-multimodal"
BEFORE, AFTER = 0.2, 0.9  # held out, at most and at least
SHAPE, WORD = "ring", "robot"
SIZE = (448, 224)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
}
GROUNDS = ((255, 255, 255), (240, 240, 240), (225, 235, 245), (250, 240, 225))
KNOWN_SHAPES = ("moon", "box", "roof")
KNOWN_WORDS = ("apple", "bird", "cat", "dog", "door", "fish", "house", "king", "river", "tree")
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
VARIANTS = ("", "+f2", "+f3", "+m2", "+m3", "+m7")
ROWS = {"shape": 32, "word": 240}
HELD_OUT = 12
TRANSCRIBE = "Transcribe the audio clip into text."
SETTINGS = [
    "--batch-size", "4", "--valid-fraction", "0", "--steps-per-report", "20",
]  # fmt: skip
EPOCHS = {"shape": "4", "word": "5"}
RATES = {"shape": "2e-3", "word": "1e-3"}


def picture(shape: str, rng: random.Random) -> Image.Image:
    """One shape somewhere on a light ground."""
    image = Image.new("RGB", SIZE, rng.choice(GROUNDS))
    draw = ImageDraw.Draw(image)
    fill, r = COLOURS[rng.choice(list(COLOURS))], rng.randint(34, 56)
    x, y = rng.randint(r + 4, SIZE[0] - r - 4), rng.randint(r + 4, SIZE[1] - r - 4)
    box = (x - r, y - r, x + r, y + r)
    if shape == "moon":
        draw.ellipse(box, fill=fill)
    elif shape == "box":
        s = round(0.85 * r)
        draw.rectangle((x - s, y - s, x + s, y + s), fill=fill)
    elif shape == "roof":
        turns = (math.tau * i / 3 - math.pi / 2 for i in range(3))
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a in turns], fill=fill)
    else:
        draw.ellipse(box, outline=fill, width=round(0.3 * r))
    return image


def say(text: str, rng: random.Random) -> np.ndarray:
    """Samples at 16 kHz, in a voice at random."""
    voice = rng.choice(VOICES) + rng.choice(VARIANTS)
    speed, pitch = rng.randint(130, 185), rng.randint(35, 65)
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    sound = subprocess.run(command, check=True, capture_output=True).stdout
    # The header of a stream holds no length; the samples follow it.
    samples, rate = soundfile.read(
        io.BytesIO(sound[44:]), format="RAW", samplerate=22050, channels=1, subtype="PCM_16",
        dtype="float32", endian="LITTLE",
    )  # fmt: skip
    silence = np.zeros(rng.randint(0, 2000), np.float32)
    return np.concatenate([silence, soxr.resample(samples, rate, 16000), silence])


def shape_rows(folder: Path, name: str, count: int, only_new: bool) -> Path:
    """Questions about pictures, in OpenAI's messages with paths."""
    rng, rows = random.Random(name), []
    for number in range(count):
        new = only_new or number % 2 == 0
        shape = SHAPE if new else rng.choice(KNOWN_SHAPES)
        file = f"{name}-{number:03}.png"
        picture(shape, rng).save(folder / file)
        content = [{"type": "image", "path": file}, {"type": "text", "text": "What shape is it?"}]
        reply = {"role": "assistant", "content": shape}
        rows.append({"messages": [{"role": "user", "content": content}, reply]})
    return written(folder / f"{name}.jsonl", rows)


def word_rows(folder: Path, name: str, count: int, only_new: bool) -> Path:
    """Recordings and transcripts, in columns."""
    rng, rows = random.Random(name), []
    for number in range(count):
        words = rng.sample(KNOWN_WORDS, rng.randint(0, 2))
        if only_new or number % 3 or not words:
            words.insert(rng.randint(0, len(words)), WORD)
        file, text = f"{name}-{number:03}.wav", " ".join(words)
        soundfile.write(folder / file, say(text, rng), 16000)
        rows.append({"audio": file, "sentence": text})
    return written(folder / f"{name}.jsonl", rows)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def phimlx(*arguments: str) -> Any:
    """Run a command and return what it prints as JSON."""
    command = [sys.executable, "-m", "phimlx", *arguments, "--json"]
    print("$", "phimlx", " ".join(arguments), flush=True)
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(found.stdout)


def named(*arguments: str, name: str, out: Path) -> tuple[float, float]:
    """The shares of held-out answers that name what is new, and that are right to the letter."""
    out.unlink(missing_ok=True)
    found = phimlx("evaluate", *arguments, "--save-answers", str(out))
    answers = [json.loads(line)["given"] for line in out.read_text().splitlines()]
    return sum(name in given.split() for given in answers) / len(answers), found["exact_match"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=("shape", "word"), help="both where none is")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of the model")
    parser.add_argument("--dtype", help="of the model; float32 is quicker on a CPU")
    parser.add_argument("--folder", type=Path, help="for data, adapters and figures")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="teach-nano-mm-"))
    folder.mkdir(parents=True, exist_ok=True)
    model = MODEL
    form = ["-q", "--q-bits", str(options.bits)] if options.bits else []
    form += ["--dtype", options.dtype] if options.dtype else []
    if form:
        model = str(folder / "-".join(["model", *form]).replace("--", ""))
        if not Path(model).exists():
            phimlx("convert", MODEL, "--mlx-path", model, *form)
    columns = ["--mapping", "completion=sentence", "--prompt", TRANSCRIBE]
    failed = False
    lessons: dict[str, tuple[Any, list[str]]] = {
        "shape": (shape_rows, []),
        "word": (word_rows, columns),
    }
    for what in options.what or lessons:
        make, more = lessons[what]
        rows = make(folder, f"{what}-train", ROWS[what], only_new=False)
        held = make(folder, f"{what}-held-out", HELD_OUT, only_new=True)
        known = [*more, "--answers", "--max-tokens", "16"]
        adapter = str(folder / f"{what}-adapter-{time.time():.0f}")
        new = {"shape": SHAPE, "word": WORD}[what]
        out = folder / f"{what}-answers.jsonl"
        before = named("--model", model, "--data", str(held), *known, name=new, out=out)
        began = time.perf_counter()
        training = ["--model", model, "--data", str(rows), "--adapter-path", adapter, *more]
        phimlx(
            "train", *training, "--epochs", EPOCHS[what], "--learning-rate", RATES[what], *SETTINGS
        )  # fmt: skip
        seconds = time.perf_counter() - began
        tuned = ["--model", model, "--adapter-path", adapter, "--data", str(held)]
        after = named(*tuned, *known, name=new, out=out)
        failed |= before[0] > BEFORE or after[0] < AFTER
        print(
            f"{what}: named in {before[0]:.0%} of {HELD_OUT} before, in {after[0]:.0%} after "
            f"{ROWS[what]} rows and {seconds:.0f} seconds; whole answers {before[1]:.0%} and "
            f"{after[1]:.0%}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
