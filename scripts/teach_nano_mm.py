"""Teaches phi-4-nano-multimodal a new shape and a new spoken word, by the command line alone.

    python scripts/teach_nano_mm.py [shape] [word] [--bits 32 4] [--folder FOLDER]

Draws pictures of a shape that the model has no name for and lets espeak-ng say a word that it never
heard, each among what it knows; trains its vision and its speech adapter on them with `phimlx
train`, in float32 and over a base at 4 bits, and asks with `phimlx evaluate` about pictures and
sounds of neither, before and after. Phrases of several words that are held out are trained on in no
recording. The word's settings were chosen by `--part validation`, whose rows are others again;
what has been trained in the folder is not trained again. The table that it ends with counts answers
that are right to the letter; it fails where they are less than `AFTER`.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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
KNOWN_WORDS = (
    "apple", "bird", "bridge", "cat", "chair", "cloud", "dog", "door", "fish", "flower", "garden",
    "house", "island", "king", "letter", "moon", "mountain", "queen", "river", "school", "table",
    "tree", "window", "wolf",
)  # fmt: skip
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
VARIANTS = ("", "+f2", "+f3", "+f4", "+m2", "+m3", "+m7")
PARTS = ("train", "train", "validation", "held-out")  # of phrases, by a hash of their words
ASKED = 40  # rows of validation, and of what is held out
TRANSCRIBE = "Transcribe the audio clip into text."


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


def shape_row(path: Path, part: str, number: int, rng: random.Random) -> dict[str, Any]:
    """A question about a picture, in OpenAI's messages with paths."""
    shape = SHAPE if part != "train" or number % 2 == 0 else rng.choice(KNOWN_SHAPES)
    path = path.with_suffix(".png")
    picture(shape, rng).save(path)
    content = [{"type": "image", "path": path.name}, {"type": "text", "text": "What shape is it?"}]
    reply = {"role": "assistant", "content": shape}
    return {"messages": [{"role": "user", "content": content}, reply]}


def phrase(part: str, number: int, rng: random.Random) -> list[str]:
    """Words of which one is new, but in a third of what is trained on.

    A phrase of several is in one part alone; the word by itself is in each, said otherwise.
    """
    (known,) = rng.choices((0, 1, 2), (1, 3, 4) if part == "train" else (1, 1, 1))
    while True:
        words = rng.sample(KNOWN_WORDS, known)
        if part != "train" or number % 3 or not words:
            words.insert(rng.randint(0, known), WORD)
        digest = hashlib.sha256(" ".join(words).encode()).digest()
        if words == [WORD] or part == PARTS[digest[0] % len(PARTS)]:
            return words


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
    before, after = (np.zeros(rng.randint(0, 3200), np.float32) for _ in range(2))
    return np.concatenate([before, soxr.resample(samples, rate, 16000), after])


def word_row(path: Path, part: str, number: int, rng: random.Random) -> dict[str, Any]:
    """A recording and its transcript, in columns."""
    text, path = " ".join(phrase(part, number, rng)), path.with_suffix(".wav")
    soundfile.write(path, say(text, rng), 16000)
    return {"audio": path.name, "sentence": text}


@dataclass(frozen=True)
class Lesson:
    """What is new, how a row of it is made, and how it is taught."""

    new: str
    rows: int
    make: Callable[[Path, str, int, random.Random], dict[str, Any]]
    columns: tuple[str, ...]
    settings: tuple[str, ...]


LESSONS = {
    "shape": Lesson(
        SHAPE, 32, shape_row, (),
        ("--epochs", "4", "--batch-size", "4", "--learning-rate", "2e-3"),
    ),
    "word": Lesson(
        WORD, 900, word_row,
        ("--mapping", "completion=sentence", "--prompt", TRANSCRIBE),
        (
            *("--epochs", "4", "--batch-size", "8", "--learning-rate", "1e-3"),
        ),
    ),
}  # fmt: skip
SETTINGS = ("--valid-fraction", "0", "--steps-per-report", "20")


def write_rows(folder: Path, what: str, part: str) -> Path:
    """Write a part of a lesson's rows, and what they show or play, where it is not there."""
    lesson, rng = LESSONS[what], random.Random(f"{what} {part}")
    path = folder / f"{what}-{part}.jsonl"
    count = lesson.rows if part == "train" else ASKED
    if not path.exists():
        rows = [lesson.make(folder / f"{what}-{part}-{i:03}", part, i, rng) for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def phimlx(*arguments: object) -> Any:
    """Run a command and return what it prints as JSON."""
    command = [sys.executable, "-m", "phimlx", *map(str, arguments), "--json"]
    print("$ phimlx", *arguments, flush=True)
    # MLX's Linux wheel carries a BLAS that is many times slower than the system's.
    fast = glob.glob("/usr/lib/*/openblas-pthread/libopenblas.so.0")
    environment = {**os.environ, **({"LD_PRELOAD": fast[0]} if fast else {})}
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(found.stdout)


def right(out: Path, new: str, *arguments: object) -> tuple[float, float]:
    """The shares of answers that are right to the letter, and that name what is new."""
    out.unlink(missing_ok=True)
    found = phimlx("evaluate", *arguments, "--save-answers", out)
    answers = [json.loads(line)["given"] for line in out.read_text().splitlines()]
    return found["exact_match"], sum(new in given.split() for given in answers) / len(answers)


@dataclass(frozen=True)
class Taught:
    """A row of the table: shares of answers that are right, or name what is new."""

    base: str
    lesson: str
    rows: int
    minutes: float
    before: float
    after: float
    named: float

    @property
    def cells(self) -> list[str]:
        shares = (f"{share:.1%}" for share in (self.before, self.after, self.named))
        return [self.base, self.lesson, str(self.rows), f"{self.minutes:.1f}", *shares]


def teach(folder: Path, bits: int, what: str, part: str) -> Taught:
    """Teach a lesson to a model of so many bits."""
    lesson, name = LESSONS[what], f"{what}-{bits}-bits"
    model = folder / f"model-{bits}-bits"
    if not model.exists():
        form = ("-q", "--q-bits", bits) if bits < 32 else ()
        phimlx("convert", MODEL, "--mlx-path", model, *form, "--dtype", "float32")
    rows, asked = (write_rows(folder, what, each) for each in ("train", part))
    measured = ("--data", asked, *lesson.columns, "--answers", "--max-tokens", 16)
    out, adapter = folder / f"{name}-answers.jsonl", folder / f"{name}-adapter"
    before = right(out, lesson.new, "--model", model, *measured)
    if not (adapter / "README.md").exists():
        phimlx(
            *("train", "--model", model, "--data", rows, "--adapter-path", adapter),
            *(*lesson.columns, *lesson.settings, *SETTINGS),
        )
    minutes = json.loads((adapter / "log.jsonl").read_text().splitlines()[-1])["seconds"] / 60
    after = right(out, lesson.new, "--model", model, "--adapter-path", adapter, *measured)
    return Taught(f"{bits} bits", what, lesson.rows, minutes, before[0], *after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(LESSONS)}; all where none is")
    parser.add_argument("--bits", type=int, nargs="+", choices=(32, 8, 4), default=(32, 4))
    parser.add_argument("--part", choices=("validation", "held-out"), default="held-out")
    parser.add_argument("--folder", type=Path, help="for models, data, adapters and answers")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="teach-nano-mm-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    table = [
        teach(folder, bits, what, options.part)
        for bits in options.bits
        for what in options.what or LESSONS
    ]
    print(f"\nRight to the letter, of {ASKED} rows of {options.part}:\n")
    head = ["base", "lesson", "rows", "minutes", "before", "after", "named after"]
    for row in [head, *(each.cells for each in table)]:
        print("".join(f"{cell:>12}" for cell in row))
    return int(any(each.before > BEFORE or each.after < AFTER for each in table))


if __name__ == "__main__":
    sys.exit(main())
