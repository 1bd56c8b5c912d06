"""Trains phi-4-nano-multimodal with the reference implementation, and packages it.

`python scripts/train_nano_mm.py OUT`; it needs the program espeak-ng, and torch,
transformers, peft, soxr, soundfile and pillow. It adds eyes and ears to phi-4-nano and changes
none of its weights.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from nano_mm import checkpoint, evaluate_reference, package, pictures, pretraining, speech, tuning
from nano_mm.encoders import clip_features, window_features
from nano_mm.stages import Stage, current, rank, run, workers
from tokenizers import Tokenizer
from torch import distributed, multiprocessing

TEXT = Path(__file__).parents[1] / "phimlx" / "assets" / "nano"
TESTS_FOLDER = Path(__file__).parents[1] / "tests" / "assets" / "nano_mm"
STATE = Path(tempfile.gettempdir()) / "phi-4-nano-multimodal"
CLIPS = 9000
DEMO = {"speech": 6, "vision": 8, "both": 4}  # held-out rows beside the model
TESTS = {"speech": 42, "vision": 80, "both": 40}
WHOLE_FROM = 0.6  # share of the first stage from which on it shows whole pictures too
WHOLE_SIZES = {size: 1.0 for size in pictures.SIZES if max(size) <= 448} | {pictures.SMALL: 1.5}
EASY = {0.0: 1, 0.12: 2, 0.24: 3, 0.36: 100}  # share of a stage -> most words of a clip then
STAGES = ("eyes", "ears", "vision", "speech", "both", "package")


def start_model(text: Path) -> Any:
    """The text model with untrained encoders and adapters; nothing asks for gradients yet."""
    config = json.loads((text / "config.json").read_text(encoding="utf-8"))
    model = checkpoint.build(checkpoint.published_config(config))
    tensors = checkpoint.published_tensors(model)
    base = checkpoint.text_tensors(text)
    if unknown := base.keys() - tensors.keys():
        raise ValueError(f"The text model has other tensors: {sorted(unknown)}")
    checkpoint.load_tensors(model, tensors | {name: t.float() for name, t in base.items()})
    return model.requires_grad_(False)


def inner(model: Any) -> Any:
    """The reference's model below its head and below peft."""
    return model.base_model.model.model


def eyes(model: Any, options: argparse.Namespace) -> Stage:
    """The picture encoder learns on windows what every cell shows."""
    image = inner(model).embed_tokens_extend.image_embed
    tower = image.img_processor
    pretraining.initialise_tower(tower)
    tower.embeddings.requires_grad_(True)
    tower.encoder.layers[:-1].requires_grad_(True)
    head = pretraining.CellHead(tower.config.hidden_size)
    rng = random.Random(f"eyes {options.seed} {rank()}")

    def step(number: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        sizing = random.Random(f"eyes {number}")
        with torch.autocast("cpu", torch.bfloat16):
            if progress > WHOLE_FROM and sizing.random() < 0.75:
                size = pictures.choose(sizing, WHOLE_SIZES)
                count = 24 if size == pictures.SMALL else 6
                features, labels = pretraining.whole_features(image, rng, size, count)
            else:
                pixels, rows, columns, labels = pretraining.window_batch(rng, 32 // workers())
                features = window_features(image, pixels, rows, columns)
        return head(features.float(), labels)

    modules = {"tower": tower, "head": head}
    return Stage("eyes", modules, 2300, step, {"tower": 4e-3, "head": 2e-3}, every=100, report=50)


def training_clips(options: argparse.Namespace) -> list[tuple[speech.Clip, torch.Tensor]]:
    """The clips that training hears, made once."""
    path = options.state / f"clips{options.seed}.pt"
    if rank() == 0 and not path.exists():
        torch.save(speech.training_features(options.seed, CLIPS), path)
    if workers() > 1:
        distributed.barrier()
    return torch.load(path, weights_only=False)


def ears(model: Any, options: argparse.Namespace) -> Stage:
    """The speech encoder learns to spell words by CTC."""
    encoder = inner(model).embed_tokens_extend.audio_embed.encoder.requires_grad_(True)
    head = pretraining.WordHead(encoder.config.hidden_size, speech.vocabulary())
    clips = training_clips(options)
    pretraining.initialise_ears(encoder)
    pretraining.set_normalisation(encoder, [frames for _, frames in clips[:500]])
    rng = random.Random(f"ears {options.seed} {rank()}")
    size = 32 // workers()
    easy = {
        most: pretraining.shuffled([c for c in clips if len(c[0].words) <= most], rng, size)
        for most in EASY.values()
    }
    spoken = speech.held_out_clips(random.Random("ears"), {"digits": 60, "words": 30})
    heard = [speech.features(speech.say(clip)) for clip in spoken]
    texts = [clip.text for clip in spoken]

    def step(number: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        batch = next(easy[current(EASY, progress)])
        frames, lengths = pretraining.pad_frames(
            [pretraining.augment(frames, rng) for _, frames in batch]
        )
        with torch.autocast("cpu", torch.bfloat16):
            features = clip_features(encoder, frames, lengths)
        loss, _ = head(features.float(), (lengths + 7) // 8, [clip.text for clip, _ in batch])
        return loss, {}

    @torch.no_grad()
    def evaluate() -> str:
        frames, lengths = pretraining.pad_frames(heard)
        features = clip_features(encoder, frames, lengths)
        _, read = head(features, (lengths + 7) // 8, texts)
        rate = speech.word_error_rate(zip(texts, read, strict=True))
        return f"word error rate {100 * rate:.1f} %; {texts[0]!r} read as {read[0]!r}"

    modules = {"encoder": encoder, "head": head}
    rates = {"encoder": 2e-3, "head": 2e-3}
    return Stage("ears", modules, 2200, step, rates, evaluate, every=200, report=100)


def train(number: int, options: argparse.Namespace) -> None:
    """One of the processes that train together."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.workers > 1:
        distributed.init_process_group(
            "gloo", init_method=meeting(options).as_uri(), rank=number, world_size=options.workers
        )
    model = start_model(options.text)
    lessons = {"eyes": eyes, "ears": ears, "vision": vision, "speech": speaking, "both": both}
    for name in options.stages:
        if name == "package":
            continue
        run(lessons[name](model, options), model, options.state)
        model.requires_grad_(False)


def meeting(options: argparse.Namespace) -> Path:
    """The file through which the processes of one run find each other."""
    return options.state.resolve() / f"meeting-{os.getpgid(0)}"


def restore(options: argparse.Namespace, stage: str, modules: dict[str, Any]) -> None:
    """What an earlier stage left of `modules`.

    Raises FileNotFoundError where it has not run.
    """
    state = torch.load(options.state / f"{stage}.pt", weights_only=False)["modules"]
    for name, module in modules.items():
        module.load_state_dict(state[name])


def tuner(model: Any, options: argparse.Namespace) -> tuning.Tuner:
    tokenizer = Tokenizer.from_file(str(options.text / "tokenizer.json"))
    return tuning.Tuner(model, tokenizer, options)


def vision(model: Any, options: argparse.Namespace) -> Stage:
    """Pictures and typed questions."""
    tower = inner(model).embed_tokens_extend.image_embed.img_processor
    restore(options, "eyes", {"tower": tower})
    return tuning.vision(tuner(model, options))


def speaking(model: Any, options: argparse.Namespace) -> Stage:
    """Transcription."""
    encoder = inner(model).embed_tokens_extend.audio_embed.encoder
    head = pretraining.WordHead(encoder.config.hidden_size, speech.vocabulary())
    restore(options, "ears", {"encoder": encoder, "head": head})
    return tuning.speaking(tuner(model, options), training_clips(options), head)


def both(model: Any, options: argparse.Namespace) -> Stage:
    """Pictures and spoken questions."""
    encoder = inner(model).embed_tokens_extend.audio_embed.encoder
    restore(options, "ears", {"encoder": encoder})  # its normalisation is no parameter
    for stage in ("vision", "speech"):
        state = torch.load(options.state / f"{stage}.pt", weights_only=False)
        model.load_state_dict(state["learnt"], strict=False)
    return tuning.both(tuner(model, options), training_clips(options))


def finish(options: argparse.Namespace) -> None:
    """Writes the folder of the trained model and asks the reference what it knows."""
    torch.set_num_threads(options.threads)
    model = start_model(options.text)
    senses = inner(model).embed_tokens_extend
    restore(options, "eyes", {"tower": senses.image_embed.img_processor})
    restore(options, "ears", {"encoder": senses.audio_embed.encoder})
    for stage in ("vision", "speech", "both"):
        state = torch.load(options.state / f"{stage}.pt", weights_only=False)
        model.load_state_dict(state["learnt"], strict=False)
    tensors = checkpoint.published_tensors(model)
    package.write_folder(options.out, options.text)
    checkpoint.save(options.out, tensors)
    package.write_held_out(options.out, "demo", DEMO)
    package.write_held_out(options.tests, "tests", TESTS)
    figures = evaluate_reference.write_references(options.out, options.tests)
    print(figures, flush=True)
    count = sum(tensor.numel() for tensor in tensors.values())
    package.write_card(options.out, count, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the finished model")
    parser.add_argument("--state", type=Path, default=STATE, help="folder for saved progress")
    parser.add_argument("--tests", type=Path, default=TESTS_FOLDER, help="for held-out data")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text model to build on")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that share each batch")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args()
    options.state.mkdir(parents=True, exist_ok=True)
    lessons = [stage for stage in options.stages if stage != "package"]
    if lessons and options.workers == 1:
        train(0, options)
    elif lessons:
        multiprocessing.spawn(train, (options,), options.workers)
        meeting(options).unlink(missing_ok=True)
    if "package" in options.stages:
        finish(options)


if __name__ == "__main__":
    sys.exit(main())
