"""Speech for phi-4-nano-multimodal: phrases, the voices that say them, and their features.

It calls the program `espeak-ng`; it knows neither the model nor which pictures are asked about.
"""

import hashlib
import io
import random
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from nano_mm import pictures
from transformers import Phi4MultimodalFeatureExtractor

RATE = 16000
NOUNS = (
    "apple", "bird", "bridge", "cat", "chair", "cloud", "dog", "door", "fish", "flower", "garden",
    "house", "island", "king", "letter", "moon", "mountain", "queen", "river", "school", "table",
    "tree", "window", "wolf",
)  # fmt: skip
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
VARIANTS = ("", "+f2", "+f3", "+f4", "+m2", "+m3", "+m7")
# What is said -> share
PHRASES = {"digits": 0.42, "words": 0.38, "question": 0.2}
HELD_OUT_SHARE = 8  # one of so many strings is never trained on


@dataclass(frozen=True)
class Clip:
    """What is said, and how."""

    text: str
    voice: str
    speed: int  # words a minute
    pitch: int  # 0 to 99
    kind: str

    @property
    def words(self) -> list[str]:
        return self.text.split()


def held_out(text: str) -> bool:
    """Whether a string of three words or more is kept from training, by its hash."""
    digest = hashlib.sha256(text.encode()).digest()
    return len(text.split()) > 2 and digest[0] % HELD_OUT_SHARE == 0


def spoken(question: str) -> str:
    """A question as a transcript spells it: lower case, no stops."""
    return question.lower().rstrip("?.")


@cache
def question_texts() -> tuple[str, ...]:
    """Every question about pictures, as spoken."""
    rng = random.Random("questions")
    texts = set()
    for _ in range(3000):
        picture = pictures.compose(rng, (448, 448))
        texts.update(spoken(question.text) for question in pictures.questions(picture))
    return tuple(sorted(texts))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that may be said."""
    words = {word for text in question_texts() for word in text.split()}
    return tuple(sorted(words | set("0123456789") | set(NOUNS)))


def phrase(rng: random.Random, kind: str) -> str:
    if kind == "question":
        return rng.choice(question_texts())
    if kind == "digits":
        return " ".join(rng.choices("0123456789", k=rng.randint(1, 6)))
    return " ".join(rng.choices(NOUNS, k=rng.randint(1, 4)))


def voiced(rng: random.Random, text: str, kind: str) -> Clip:
    voice = rng.choice(VOICES) + rng.choice(VARIANTS)
    return Clip(text, voice, rng.randint(130, 185), rng.randint(35, 65), kind)


def training_clip(rng: random.Random) -> Clip:
    """A random clip whose words are not held out."""
    while True:
        kind = str(pictures.choose(rng, PHRASES))
        text = phrase(rng, kind)
        if kind == "question" or not held_out(text):
            return voiced(rng, text, kind)


def held_out_clips(rng: random.Random, counts: dict[str, int]) -> list[Clip]:
    """Clips of strings that training never says; questions in voices at random."""
    clips = []
    for kind, count in counts.items():
        while count:
            text = phrase(rng, kind)
            if kind == "question" or held_out(text):
                clips.append(voiced(rng, text, kind))
                count -= 1
    return clips


def say(clip: Clip) -> np.ndarray:
    """Samples at 16 kHz, float32 in [-1, 1].

    Raises subprocess.CalledProcessError where espeak-ng fails, FileNotFoundError where it lacks.
    """
    options = ["-v", clip.voice, "-s", str(clip.speed), "-p", str(clip.pitch)]
    command = ["espeak-ng", *options, "--stdout", clip.text]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    # The header of a stream holds no length; the samples follow it.
    samples, rate = soundfile.read(
        io.BytesIO(output[44:]), format="RAW", samplerate=22050, channels=1, subtype="PCM_16",
        dtype="float32", endian="LITTLE",
    )  # fmt: skip
    return soxr.resample(samples, rate, RATE).astype(np.float32)


@cache
def extractor() -> Any:
    return Phi4MultimodalFeatureExtractor()


def features(samples: np.ndarray) -> torch.Tensor:
    """Log-mel features [frames, 80] of one clip, as the published front-end makes them."""
    return extractor()(samples, sampling_rate=RATE).audio_input_features[0]


def noisy(samples: np.ndarray, rng: random.Random) -> np.ndarray:
    """Gain, silence around, and in half of the clips a little white noise."""
    samples = samples * rng.uniform(0.4, 1.2)
    before, after = (np.zeros(rng.randint(0, 3200), np.float32) for _ in range(2))
    samples = np.concatenate([before, samples, after])
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(samples))
        samples = samples + noise.astype(np.float32) * 10 ** rng.uniform(-4, -2)
    return samples.clip(-1, 1).astype(np.float32)


def training_features(seed: int, count: int) -> list[tuple[Clip, torch.Tensor]]:
    """`count` clips with their features, float16; the voice says each anew."""
    rng = random.Random(f"speech {seed}")
    clips = [training_clip(rng) for _ in range(count)]
    seeds = [rng.getrandbits(32) for _ in clips]

    def make(pair: tuple[Clip, int]) -> torch.Tensor:
        return features(noisy(say(pair[0]), random.Random(pair[1]))).half()

    with ThreadPoolExecutor(3) as pool:
        return list(zip(clips, pool.map(make, zip(clips, seeds, strict=True)), strict=True))


def word_error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Edits over words of the references; pairs of reference and hypothesis."""
    edits = words = 0
    for reference, hypothesis in pairs:
        wanted, given = reference.split(), hypothesis.split()
        row = list(range(len(given) + 1))
        for index, word in enumerate(wanted, 1):
            previous, row[0] = row[0], index
            for column, other in enumerate(given, 1):
                change = previous + (word != other)
                previous = row[column]
                row[column] = min(change, row[column] + 1, row[column - 1] + 1)
        edits += row[-1]
        words += len(wanted)
    return edits / words
