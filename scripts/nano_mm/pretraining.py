"""Pre-training of the two encoders on their own, before a language model looks through them.

The picture encoder learns what each cell of a picture shows, the speech encoder to spell words by
CTC (Graves et al. 2006); the heads that ask for this are thrown away. It knows no language model.
"""

import math
import random
from typing import Any

import numpy as np
import torch
from nano_mm import pictures
from nano_mm.encoders import crop_features, prepare, window_features
from torch import nn
from torch.nn import functional

WINDOW = 8  # cells per side


class CellHead(nn.Module):
    """What every cell shows, by `pictures.LABELS`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cells = nn.Linear(width, sum(pictures.LABELS.values()))

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss, and shares right where something is. [n, cells, d], [n, labels, cells]"""
        parts = self.cells(self.norm(features)).float().split(list(pictures.LABELS.values()), -1)
        loss, shares = torch.zeros(()), {}
        for index, (name, logits) in enumerate(zip(pictures.LABELS, parts, strict=True)):
            target = labels[:, index]
            if not (target >= 0).any():
                continue
            weight = torch.ones(logits.shape[-1])
            if name in ("kind", "colour", "centre"):
                weight[0] = 0.3
            part = functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), weight, ignore_index=-1
            )
            loss = loss + part * (0.3 if name in ("down", "across") else 1.0)
            there = target >= 0 if name in ("down", "across") else target > 0
            shares[name] = (logits.argmax(-1)[there] == target[there]).float().mean().item()
        return loss, shares


def normalised(images: list[np.ndarray]) -> torch.Tensor:
    """[n, 3, height, width] with values from -1 to 1."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (batch / 255 - 0.5) / 0.5


def window_batch(rng: random.Random, count: int) -> tuple[torch.Tensor, ...]:
    """Windows around objects: pixels [n, 3, 224, 224], position rows and columns [n, 16], cell
    labels [n, labels, 64]."""
    pixels, rows, columns, labels = [], [], [], []
    for _ in range(count):
        width, height = pictures.choose(rng, pictures.SIZES)
        scene = pictures.compose(rng, (width, height))
        image = np.asarray(pictures.draw(scene))[:, :448]
        cells = pictures.cells(scene)[:, : height // 28, : min(width, 448) // 28]
        thing = rng.choice(scene.objects)
        starts = []
        for place, extent in ((thing.y, cells.shape[1]), (thing.x, cells.shape[2])):
            wanted = place // 28 - rng.randrange(WINDOW)
            starts.append(max(0, min(wanted, extent - WINDOW)))
        top, left = starts
        pixels.append(image[top * 28 : (top + WINDOW) * 28, left * 28 : (left + WINDOW) * 28])
        seen = cells[:, top : top + WINDOW, left : left + WINDOW].copy()
        seen[3] = -1
        if scene.number and scene.objects[0].x - scene.objects[0].radius < left * 28:
            seen[4] = -1
        labels.append(seen.reshape(len(seen), -1))
        steps = np.arange(2 * WINDOW)
        rows.append((2 * top + steps) * 32 // (2 * cells.shape[1]))
        columns.append((2 * left + steps) * 32 // (2 * cells.shape[2]))
    rest = (torch.from_numpy(np.stack(part)) for part in (rows, columns, labels))
    return normalised(pixels), *rest


def whole_features(
    image_embed: Any, rng: random.Random, size: tuple[int, int], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, cells, d] and labels [n, labels, cells] of whole pictures."""
    scenes = [pictures.compose(rng, size) for _ in range(count)]
    images = [pictures.draw(scene) for scene in scenes]
    labels = torch.stack([torch.from_numpy(pictures.cells(scene)) for scene in scenes])
    if size == pictures.SMALL:
        places = (torch.arange(16) * 2).expand(count, -1)
        pixels = normalised([np.asarray(image) for image in images])
        features = window_features(image_embed, pixels, places, places)
        return features, labels[:, :, :8, :8].flatten(2)
    pixels, masks, _ = prepare(images)
    return crop_features(image_embed, pixels[:, 1], masks[:, 1]), labels.flatten(2)


def initialise_tower(tower: Any) -> None:
    """Xavier weights, and waves for the places of rows and columns (Vaswani et al. 2017).

    The reference's own are meant to be overwritten by a checkpoint.
    """
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    table = tower.embeddings.position_embedding.weight
    side = math.isqrt(len(table))
    waves = table.shape[1] // 4
    turns = 2 * math.pi * torch.arange(side)[:, None] / torch.logspace(0.5, 1.8, waves)
    line = 0.4 * torch.cat([turns.sin(), turns.cos()], 1)
    with torch.no_grad():
        table.copy_(torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], 1))


class WordHead(nn.Module):
    """CTC over whole words, entry 0 the blank; and which word of the clip each frame belongs to.

    The second helps the language model, which has to find the next word and not a like one.
    """

    MOST = 20

    def __init__(self, width: int, words: tuple[str, ...]) -> None:
        super().__init__()
        self.index = {word: number for number, word in enumerate(words, 1)}
        self.words = ("", *words)
        self.output = nn.Linear(width, len(self.words))
        self.place = nn.Linear(width, self.MOST + 1)

    def forward(
        self, features: torch.Tensor, lengths: torch.Tensor, texts: list[str]
    ) -> tuple[torch.Tensor, list[str]]:
        """Loss, and what greedy decoding reads."""
        logits = self.output(features).float().log_softmax(-1)
        targets = [[self.index[word] for word in text.split()] for text in texts]
        loss = functional.ctc_loss(
            logits.transpose(0, 1),
            torch.tensor([number for target in targets for number in target]),
            lengths,
            torch.tensor([len(target) for target in targets]),
            zero_infinity=True,
        )
        best = logits.argmax(-1)
        read = []
        places = torch.full(best.shape, -1)
        for index, (row, length) in enumerate(zip(best, lengths, strict=True)):
            merged = torch.unique_consecutive(row[:length]).tolist()
            read.append(" ".join(self.words[number] for number in merged if number))
            if read[-1] == texts[index]:
                begins = (row[1:length] != row[: length - 1]) & (row[1:length] > 0)
                begins = torch.cat([row[:1] > 0, begins])
                places[index, :length] = begins.cumsum(0).clamp(max=self.MOST)
        if (places >= 0).any():
            placed = self.place(features).float().flatten(0, 1)
            loss = loss + functional.cross_entropy(placed, places.flatten(), ignore_index=-1)
        return loss, read


def augment(frames: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Another tempo and SpecAugment's masks (Park et al. 2019). [frames, 80] -> [frames', 80]"""
    frames = frames.float()
    if rng.random() < 0.5:
        length = round(len(frames) * rng.uniform(0.9, 1.15))
        frames = functional.interpolate(frames.T[None], length, mode="linear")[0].T
    frames = frames.clone()
    mean = frames.mean()
    for _ in range(rng.randint(0, 2)):
        start, width = rng.randrange(80), rng.randint(1, 10)
        frames[:, start : start + width] = mean
        start, width = rng.randrange(len(frames)), rng.randint(1, 8)
        frames[start : start + width] = mean
    return frames


def pad_frames(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [frames, 80] as [n, longest, 80] and their frame counts [n]."""
    lengths = torch.tensor([len(clip) for clip in clips])
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), lengths


def initialise_ears(encoder: Any) -> None:
    """Torch's own first weights: the reference's, 0.02 everywhere, die away in the convolutions."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.reset_parameters()


def set_normalisation(encoder: Any, clips: list[torch.Tensor]) -> None:
    """Mean and inverse deviation of every mel band over `clips`."""
    frames = torch.cat([clip.float() for clip in clips])
    encoder.encoder_embedding.global_mean.copy_(frames.mean(0))
    encoder.encoder_embedding.global_invstd.copy_(1 / frames.std(0))


def shuffled(clips: list, rng: random.Random, size: int) -> Any:
    """Batches without end, of clips of like length."""
    while True:
        order = sorted(rng.sample(clips, len(clips)), key=lambda clip: len(clip[1]) // 16)
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(batches)
        yield from batches
