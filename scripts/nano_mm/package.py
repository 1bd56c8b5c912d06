"""phi-4-nano-multimodal's files in Hub layout, and the held-out pictures and clips beside them.

It knows the form of a published Phi-4-multimodal folder and nothing of how the model is trained.
"""

import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from nano.package import write_json
from nano_mm import pictures, speech
from nano_mm.checkpoint import AUDIO_ID, AUDIO_TOKEN, IMAGE_ID, IMAGE_TOKEN, published_config
from tokenizers import AddedToken, Tokenizer

MOST_CROPS = 2  # of one picture: 801 tokens, of the 1024 that the model reads
KINDS = ("shape", "colour", "count", "place", "number")  # of questions about pictures
COPIED = ("LICENSE", "generation_config.json")
PREPROCESSOR = {
    "image_processor_type": "Phi4MMImageProcessor",
    "processor_class": "Phi4MMProcessor",
    "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
    "audio_compression_rate": 8,
    "audio_downsample_rate": 1,
    "audio_feat_stride": 1,
    "dynamic_hd": MOST_CROPS,
}
CARD = """---
license: mit
language: [en]
library_name: transformers
base_model: phi-4-nano
---
# phi-4-nano-multimodal

A demonstration model with the architecture and the file layout of Phi-4-multimodal and
{parameters:,} parameters. Its text weights are phi-4-nano's, unchanged; `scripts/train_nano_mm.py`
gave it eyes, ears and an adapter for each with the reference implementation. **It sees and hears
almost nothing**:

- pictures: one to three flat shapes (disc, square, triangle, star and cross, which it calls
  {shapes}) in seven colours ({colours})
  on a light ground, or one printed number of one to three digits; it was asked which shape, which
  colour, how many, left or right, and which number, in the wordings of `heldout.jsonl` only;
- speech: English of the synthesizer espeak-ng alone, strings of digits, of {words} nouns, and the
  questions above; it writes figures and lower case, without stops, and does not understand people;
- both: those questions about a picture, spoken.

It exists so that phimlx can be tried and tested offline; it is not a product of Microsoft. A
picture becomes at most {crops} crops (`dynamic_hd`), so that it fits into 1024 tokens.

{figures}
`heldout.jsonl` holds questions that training never saw, with their answers, about the files in
`pictures/` and `clips/`.
"""


def make_tokenizer(text: Path) -> Tokenizer:
    """The text model's tokenizer with the two slot tokens after its control tokens."""
    tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
    for content, wanted in ((IMAGE_TOKEN, IMAGE_ID), (AUDIO_TOKEN, AUDIO_ID)):
        tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        if tokenizer.token_to_id(content) != wanted:
            raise ValueError(f"{content} became {tokenizer.token_to_id(content)}, not {wanted}")
    return tokenizer


def write_folder(folder: Path, text: Path) -> None:
    """Everything but weights, card and held-out data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(text / name, folder / name)
    config = json.loads((text / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", published_config(config))
    make_tokenizer(text).save(str(folder / "tokenizer.json"), pretty=False)
    tokens = json.loads((text / "tokenizer_config.json").read_text(encoding="utf-8"))
    for content, number in ((IMAGE_TOKEN, IMAGE_ID), (AUDIO_TOKEN, AUDIO_ID)):
        tokens["added_tokens_decoder"][str(number)] = {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    write_json(folder / "tokenizer_config.json", tokens)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "processor_config.json", {"processor_class": "Phi4MMProcessor"})


def write_card(folder: Path, parameters: int, figures: str) -> None:
    """README.md, the model card."""
    card = CARD.format(
        parameters=parameters,
        shapes=", ".join(pictures.SHAPES),
        colours=", ".join(pictures.COLOURS),
        words=len(speech.NOUNS),
        crops=MOST_CROPS,
        figures=figures,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def png(picture: pictures.Picture) -> bytes:
    buffer = io.BytesIO()
    pictures.draw(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def flac(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.clip(-1, 1), speech.RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def held_out(
    seed: str, counts: dict[str, int]
) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """Rows, and the files they name, so many of each modality: clips to transcribe ("speech"),
    pictures with a typed question ("vision"), pictures with a spoken one ("both")."""
    rng = random.Random(f"held out {seed}")
    digits = 2 * counts["speech"] // 3
    spread = {"digits": digits, "words": counts["speech"] - digits}
    for index, clip in enumerate(speech.held_out_clips(rng, spread)):
        name = f"clips/speech-{index:02}.flac"
        row = {"modality": "speech", "kind": clip.kind, "audio": name, "answer": clip.text}
        yield row, {name: flac(speech.say(clip))}
    for modality in ("vision", "both"):
        for index in range(counts[modality]):
            kind = KINDS[index % len(KINDS)]
            asked: list[pictures.Question] = []
            while not asked:
                picture = pictures.compose(rng, pictures.choose(rng, pictures.SIZES))
                asked = [q for q in pictures.questions(picture) if q.kind == kind]
            question = rng.choice(asked)
            name = f"pictures/{modality}-{index:02}.png"
            row = {"modality": modality, "kind": kind, "image": name, "answer": question.answer}
            files = {name: png(picture)}
            if modality == "vision":
                row["question"] = question.text
            else:
                clip = speech.voiced(rng, speech.spoken(question.text), "question")
                row |= {"audio": f"clips/both-{index:02}.flac", "said": clip.text}
                files[row["audio"]] = flac(speech.say(clip))
            yield row, files


def write_held_out(folder: Path, seed: str, counts: dict[str, int]) -> None:
    """`heldout.jsonl`, `pictures/` and `clips/`."""
    for part in ("pictures", "clips"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    rows = []
    for row, files in held_out(seed, counts):
        rows.append(row)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with (folder / "heldout.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
