"""The stages in which the language model learns to use its eyes and ears, adapter by adapter.

The text weights stay as they are; every other step feels them rounded to 4 bits. It knows which
inputs each adapter sees, not how pictures are drawn or clips are said.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nano_mm import encoders, pictures, speech
from nano_mm.checkpoint import AUDIO_ID, IMAGE_ID
from nano_mm.language import TRANSCRIBE, Rounding, Rows, Turn, embed, forward, pack, turn
from nano_mm.pretraining import WordHead, augment, pad_frames, shuffled
from nano_mm.stages import Stage, current, rank, workers
from tokenizers import Tokenizer

STEP = 128  # the text model's original_max_position_embeddings
ROUNDED_FROM = 0.5  # share of a stage after which every other step has 4-bit text weights
SEEING = 0.5  # share of a stage from which on whole pictures train the encoder too
LISTENING = 0.52  # share of the speech stage after which the encoder stays as it is
# stage -> share of it from which on -> share of small pictures
SMALL_SHARE = {
    "vision": {0.0: 1.0, 0.2: 0.5, 0.4: 0.2, 0.7: 0.0},
    "both": {0.0: 0.5, 0.3: 0.25, SEEING: 0.0},
}
DECISIVE = 4.0  # weight of digits and of the first tokens of words in answers about pictures
ASKED = 6  # questions about one picture in one row
OFTEN = {"colour": 2.0, "place": 2.0}  # kinds that are asked more often, as they are learnt last


class Tuner:
    """What the three stages share: the model's parts, the tokenizer, the rounding."""

    def __init__(self, model: Any, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        self.adapted = model
        self.model = model.base_model.model.model
        self.head = model.base_model.model.lm_head
        self.image = self.model.embed_tokens_extend.image_embed
        self.audio = self.model.embed_tokens_extend.audio_embed
        tower = self.image.img_processor
        self.eyes = torch.nn.ModuleList([tower.embeddings, *tower.encoder.layers[:-1]])
        self.tokenizer = tokenizer
        self.rounding = Rounding(model)
        self.user = tokenizer.token_to_id("<|user|>")
        self.seed = options.seed

    def adapter(self, name: str) -> torch.nn.Module:
        """Switches to an adapter and gives its weights, asking for gradients."""
        self.adapted.set_adapter(name)
        weights = torch.nn.ParameterDict()
        for key, parameter in self.adapted.named_parameters():
            if f".{name}.weight" in key and "lora_" in key:
                weights[key.replace(".", "|")] = parameter.requires_grad_(True)
        self.model.train()
        return weights

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{name} {self.seed} {rank()}")

    def typed(self, question: pictures.Question) -> Turn:
        """A question that follows its picture at once, as the published prompt has it."""
        return turn(self.tokenizer, [], question.text, question.answer, DECISIVE)

    def answers(
        self, rows: Rows, images: torch.Tensor | None, clips: list[torch.Tensor], rough: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and which turns greedy decoding would answer rightly."""
        with self.rounding(rough):
            embedded = embed(self.model, rows.ids, images, clips)
            return forward(self.model, self.head, embedded, rows)

    def picture_rows(self, scenes: list[pictures.Picture]) -> torch.Tensor:
        """Projected rows."""
        images = [pictures.draw(scene) for scene in scenes]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.model.training):
            if images[0].size == pictures.SMALL:
                return encoders.small_rows(self.image, images)
            return encoders.image_rows(self.image, encoders.prepare(images))

    def lesson(
        self, stage: str, number: int, progress: float, rng: random.Random
    ) -> tuple[bool, list[list[pictures.Question]], torch.Tensor]:
        """Whether a step's pictures are small, questions about each, and the projected rows.

        The encoder learns from small pictures, and late in a stage from all.
        """
        sizing = random.Random(f"{stage} {number}")
        small = sizing.random() < current(SMALL_SHARE[stage], progress)
        size = pictures.SMALL if small else pictures.choose(sizing, pictures.SIZES)
        self.eyes.requires_grad_(small or progress > SEEING)
        count = 12 if small else max(1, 1200 // encoders.image_tokens(*size))
        scenes = [pictures.compose(rng, size, pictures.LESSONS) for _ in range(count)]
        asked = [ask(rng, scene) for scene in scenes]
        return small, asked, self.picture_rows(scenes)

    def shared(self, images: torch.Tensor) -> list[int]:
        return [self.user] + [IMAGE_ID] * images.shape[1]


def ask(rng: random.Random, picture: pictures.Picture) -> list[pictures.Question]:
    """Some of the questions about a picture."""
    asked = pictures.questions(picture)
    # Drawn without replacement by weight (Efraimidis and Spirakis 2006)
    asked.sort(key=lambda question: rng.random() ** (1 / OFTEN.get(question.kind, 1.0)))
    return asked[-ASKED:]


def image_parts(tuner: Tuner) -> torch.nn.Module:
    """Projection and separators."""
    image = tuner.image
    parts = torch.nn.ModuleDict({"up": image.img_projection_up, "down": image.img_projection_down})
    parts.requires_grad_(True)
    parts.separators = torch.nn.ParameterList(
        [image.global_img_feature_extensor, image.sub_img_feature_extensor]
    )
    return parts.requires_grad_(True)


def picture_test(count: int) -> list[tuple[tuple[int, int], list[pictures.Picture]]]:
    """Pictures that training does not draw, by size."""
    rng = random.Random("picture test")
    groups: dict[tuple[int, int], list[pictures.Picture]] = defaultdict(list)
    for _ in range(count):
        size = pictures.choose(rng, pictures.SIZES)
        groups[size].append(pictures.compose(rng, size))
    return list(groups.items())


def shares(counts: dict[str, list[int]]) -> str:
    """Per cent right by kind and over all."""
    total = [sum(count[i] for count in counts.values()) for i in range(2)]
    both = {**dict(sorted(counts.items())), "all": total}
    return ", ".join(f"{kind} {100 * right / asked:.0f}" for kind, (right, asked) in both.items())


@torch.no_grad()
def answered(tuner: Tuner, groups: list[Any], hear: Callable[..., Any] | None = None) -> str:
    """Held-out answers that greedy decoding gives, %, typed or (with `hear`) spoken."""
    tuner.model.eval()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    rng = random.Random("test")
    for _, scenes in groups:
        asked = [rng.sample(q, min(ASKED, len(q))) for q in map(pictures.questions, scenes)]
        images = tuner.picture_rows(scenes)
        clips: list[torch.Tensor] = []
        if hear:
            turns = [[hear(rng, q, clips) for q in questions] for questions in asked]
        else:
            turns = [[tuner.typed(q) for q in questions] for questions in asked]
        _, right = tuner.answers(pack(tuner.shared(images), turns), images, clips, False)
        kinds = [question.kind for questions in asked for question in questions]
        for kind, hit in zip(kinds, right.tolist(), strict=True):
            counts[kind][0] += int(hit)
            counts[kind][1] += 1
    tuner.model.train()
    return shares(counts)


def vision(tuner: Tuner) -> Stage:
    """Projection and vision adapter learn to answer questions about pictures."""
    tower = tuner.image.img_processor
    modules = {"lora": tuner.adapter("vision"), "projection": image_parts(tuner), "tower": tower}
    tuner.eyes.requires_grad_(True)
    rng = tuner.rng("vision")
    groups = picture_test(48)

    def step(number: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        small, asked, images = tuner.lesson("vision", number, progress, rng)
        turns = [[tuner.typed(q) for q in questions] for questions in asked]
        rough = progress > ROUNDED_FROM and number % 2 == 0
        loss, right = tuner.answers(pack(tuner.shared(images), turns), images, [], rough)
        return loss, {"small right" if small else "right": right.float().mean().item()}

    rates = {"lora": 2e-3, "projection": 2e-3, "tower": 1e-3}
    evaluate = partial(answered, tuner, groups)
    return Stage("vision", modules, 1200, step, rates, evaluate, every=150, report=30)


def transcription(tuner: Tuner, tokens: int, text: str) -> Turn:
    """The order to transcribe a clip of so many tokens, and what it says."""
    return turn(tuner.tokenizer, [AUDIO_ID] * tokens, TRANSCRIBE, text)


@torch.no_grad()
def transcribed(tuner: Tuner, clips: list[speech.Clip], heard: list[torch.Tensor]) -> str:
    """Held-out clips whose whole transcript greedy decoding gives, %, by kind."""
    tuner.model.eval()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for start in range(0, len(clips), 16):
        frames, lengths = pad_frames(heard[start : start + 16])
        features = encoders.clip_features(tuner.audio.encoder, frames, lengths)
        rows = encoders.clip_rows(tuner.audio, features, "speech")
        sizes = ((lengths + 7) // 8).tolist()
        spoken = [row[:size] for row, size in zip(rows, sizes, strict=True)]
        some = clips[start : start + 16]
        turns = [[transcription(tuner, s, c.text)] for s, c in zip(sizes, some, strict=True)]
        _, right = tuner.answers(pack([tuner.user], turns), None, spoken, False)
        for clip, hit in zip(some, right.tolist(), strict=True):
            counts[clip.kind][0] += int(hit)
            counts[clip.kind][1] += 1
    tuner.model.train()
    return shares(counts)


def joined(
    batch: list[tuple[speech.Clip, torch.Tensor]], rng: random.Random
) -> list[tuple[str, torch.Tensor]]:
    """Texts and augmented frames; a fourth of the batches says several clips one after another."""
    pieces = [(clip.text, augment(frames, rng)) for clip, frames in batch]
    if rng.random() < 0.75:
        return pieces
    size = rng.randint(2, 4)
    groups = [pieces[i : i + size] for i in range(0, len(pieces) - size + 1, size)]
    return [(" ".join(t for t, _ in g), torch.cat([f for _, f in g])) for g in groups]


def speaking(tuner: Tuner, clips: list[tuple[speech.Clip, torch.Tensor]], words: WordHead) -> Stage:
    """Projection and speech adapter learn to transcribe; CTC goes on beside them."""
    audio = tuner.audio
    projection = torch.nn.ModuleList([audio.up_proj_for_speech, audio.down_proj_for_speech])
    encoder = audio.encoder
    for module in (projection, encoder):
        module.requires_grad_(True)
    modules = {"lora": tuner.adapter("speech"), "projection": projection}
    modules |= {"encoder": encoder, "head": words}
    rng = tuner.rng("speech")
    batches = shuffled(clips, rng, 32 // workers())
    counts = {"digits": 48, "words": 24, "question": 24}
    held = speech.held_out_clips(random.Random("speech"), counts)
    heard = [speech.features(speech.say(clip)) for clip in held]

    def step(number: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        encoder.requires_grad_(progress < LISTENING)
        pieces = joined(next(batches), rng)
        frames, lengths = pad_frames([frames for _, frames in pieces])
        sizes = (lengths + 7) // 8
        texts = [text for text, _ in pieces]
        with torch.autocast("cpu", torch.bfloat16):
            features = encoders.clip_features(encoder, frames, lengths)
            rows = encoders.clip_rows(audio, features, "speech")
        spelling, _ = words(features.float(), sizes, texts)
        turns = [
            transcription(tuner, size, text)
            for size, text in zip(sizes.tolist(), texts, strict=True)
        ]
        # The reference takes one rope table for a whole batch: rows of the other one are left out.
        long = [len(turn.ids) + 1 > STEP for turn in turns]
        kept = [i for i, is_long in enumerate(long) if is_long == (2 * sum(long) > len(long))]
        spoken = [rows[i, : sizes[i]] for i in kept]
        packed = pack([tuner.user], [[turns[i]] for i in kept])
        rough = progress > ROUNDED_FROM and number % 2 == 0
        loss, right = tuner.answers(packed, None, spoken, rough)
        return loss + 0.3 * spelling, {"ctc": spelling.item(), "right": right.float().mean().item()}

    rates = {"lora": 2e-3, "projection": 2e-3, "encoder": 1e-3, "head": 5e-4}
    evaluate = partial(transcribed, tuner, held, heard)
    return Stage("speech", modules, 1500, step, rates, evaluate, every=200, report=40)


@torch.no_grad()
def by_text(encoder: Any, clips: list[tuple[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """What the finished speech encoder makes of clips: text -> features [tokens, d] of each."""
    result: dict[str, list[torch.Tensor]] = defaultdict(list)
    for text, frames in clips:
        length = torch.tensor([len(frames)])
        result[text].append(encoders.clip_features(encoder, frames.float()[None], length)[0])
    return result


def both(tuner: Tuner, clips: list[tuple[speech.Clip, torch.Tensor]]) -> Stage:
    """The vision adapter learns to take questions from speech, through a projection of its own."""
    audio = tuner.audio
    projection = torch.nn.ModuleList(
        [audio.up_proj_for_vision_speech, audio.down_proj_for_vision_speech]
    )
    projection.requires_grad_(True)
    for target, source in (
        (audio.up_proj_for_vision_speech, audio.up_proj_for_speech),
        (audio.down_proj_for_vision_speech, audio.down_proj_for_speech),
    ):
        target.load_state_dict(source.state_dict())
    modules = {"lora": tuner.adapter("vision"), "hearing": projection}
    modules |= {"projection": image_parts(tuner), "tower": tuner.image.img_processor}
    tuner.eyes.requires_grad_(True)
    rng = tuner.rng("both")
    groups = picture_test(48)
    said = [(clip.text, frames) for clip, frames in clips if clip.kind == "question"]
    test = random.Random("spoken questions")
    new = [speech.voiced(test, text, "question") for text in speech.question_texts() * 3]
    unheard = [(clip.text, speech.features(speech.say(clip))) for clip in new]
    pools = [by_text(audio.encoder, some) for some in (said, unheard)]

    def spoken(
        pool: dict[str, list[torch.Tensor]],
        rng: random.Random,
        question: pictures.Question,
        rows: list[torch.Tensor],
    ) -> Turn:
        """The question as a clip after its picture; the clip's rows are added to `rows`."""
        features = rng.choice(pool[speech.spoken(question.text)])
        rows.append(encoders.clip_rows(audio, features, "vision"))
        prompt = [AUDIO_ID] * len(features)
        return turn(tuner.tokenizer, prompt, "", question.answer, DECISIVE)

    def step(number: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        _, asked, images = tuner.lesson("both", number, progress, rng)
        rows: list[torch.Tensor] = []
        turns, aloud = [], []
        for questions in asked:
            choice = [rng.random() < 0.6 for _ in questions]
            aloud += choice
            turns.append(
                [
                    spoken(pools[0], rng, q, rows) if voice else tuner.typed(q)
                    for q, voice in zip(questions, choice, strict=True)
                ]
            )
        rough = progress > ROUNDED_FROM and number % 2 == 0
        loss, right = tuner.answers(pack(tuner.shared(images), turns), images, rows, rough)
        by_voice = torch.tensor(aloud)
        figures = {
            "spoken right": right[by_voice].float().mean().item(),
            "typed right": right[~by_voice].float().mean().item(),
        }
        return loss, figures

    def evaluate() -> str:
        typed = answered(tuner, groups)
        return f"typed: {typed}; spoken: {answered(tuner, groups, partial(spoken, pools[1]))}"

    rates = {"lora": 2e-3, "hearing": 2e-3, "projection": 1.5e-3, "tower": 1e-3}
    return Stage("both", modules, 900, step, rates, evaluate, every=100, report=25)
