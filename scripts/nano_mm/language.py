"""Questions and answers as rows that the reference's language model is trained on.

Several questions about one picture share its tokens: each sees the picture and itself alone, at
the positions it would have on its own. It knows neither where questions come from nor schedules.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nano.quantization import quantize_dequantize
from nano_mm.checkpoint import AUDIO_ID, IMAGE_ID
from tokenizers import Tokenizer
from torch.nn import functional

IGNORED = -100
TRANSCRIBE = "Transcribe the audio clip into text."


@dataclass(frozen=True)
class Turn:
    """One question and its answer as token ids; what is not to be learnt weighs 0."""

    ids: list[int]
    weights: list[float]


@dataclass
class Rows:
    """A batch: ids, labels, their weights, and positions [n, length]; mask [n, 1, length, length];
    the turn that each token belongs to, numbered through the batch, -1 for what the turns share."""

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    turns: torch.Tensor
    count: int


def turn(
    tokenizer: Tokenizer, prompt: list[int], text: str, answer: str, decisive: float = 1.0
) -> Turn:
    """`prompt` is what stands between the shared tokens and the text: slots of a clip, or nothing.

    Digits and the first tokens of words weigh `decisive`, since the others follow from them.
    """

    def control(content: str) -> int:
        return tokenizer.token_to_id(content)

    asked = [*prompt, *tokenizer.encode(text, add_special_tokens=False).ids]
    asked += [control("<|end|>"), control("<|assistant|>")]
    said = tokenizer.encode(answer, add_special_tokens=False)
    weights = [
        decisive if start == 0 or " " in answer[start - 1 : end] or answer[start].isdigit() else 1.0
        for start, end in said.offsets
    ]
    answered = [*said.ids, control("<|end|>")]
    return Turn(asked + answered, [0.0] * len(asked) + [*weights, 1.0])


def pack(shared: list[int], rows: Sequence[Sequence[Turn]]) -> Rows:
    """Rows that each begin with `shared` and go on with their turns side by side."""
    longest = len(shared) + max(sum(len(turn.ids) for turn in turns) for turns in rows)
    shape = len(rows), longest
    ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    weights = torch.zeros(shape)
    positions = torch.zeros(shape, dtype=torch.long)
    numbers = torch.full(shape, -2)  # padding: of no turn
    count = 0
    for row, turns in enumerate(rows):
        start = len(shared)
        ids[row, :start] = torch.tensor(shared)
        positions[row, :start] = torch.arange(start)
        numbers[row, :start] = -1
        for turn in turns:
            end = start + len(turn.ids)
            tokens = torch.tensor(turn.ids)
            ids[row, start:end] = tokens
            # What the next token is to be
            weights[row, start : end - 1] = torch.tensor(turn.weights[1:])
            learnt = weights[row, start : end - 1] > 0
            labels[row, start : end - 1] = torch.where(learnt, tokens[1:], IGNORED)
            positions[row, start:end] = len(shared) + torch.arange(len(tokens))
            numbers[row, start:end] = count
            count += 1
            start = end
    same = numbers[:, :, None] == numbers[:, None, :]
    mask = (same | (numbers == -1)[:, None, :]) & torch.ones(longest, longest).tril().bool()
    return Rows(ids, labels, weights, positions, mask[:, None], numbers, count)


def embed(
    model: Any, ids: torch.Tensor, images: torch.Tensor | None, clips: list[torch.Tensor]
) -> torch.Tensor:
    """Token embeddings with the pictures' and the clips' rows in their slots, in order."""
    rows = model.embed_tokens(ids)
    for slot, values in ((IMAGE_ID, images), (AUDIO_ID, torch.cat(clips) if clips else None)):
        if values is not None:
            where = torch.nonzero(ids == slot, as_tuple=True)
            rows = rows.index_put(where, values.reshape(-1, rows.shape[-1]).to(rows.dtype))
    return rows


def forward(
    model: Any, head: torch.nn.Module, embedded: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy over the labels, and for each turn whether greedy decoding says it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        hidden = model(
            inputs_embeds=embedded,
            attention_mask=rows.mask,
            position_ids=rows.positions,
            use_cache=False,
        ).last_hidden_state
        wanted = rows.labels != IGNORED
        logits = head(hidden[wanted]).float()
    targets = rows.labels[wanted]
    wrong = torch.zeros(rows.count)
    wrong.index_add_(0, rows.turns[wanted], (logits.argmax(-1) != targets).float())
    weights = rows.weights[wanted]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), wrong == 0


class Rounding:
    """The frozen text weights as 4-bit quantization leaves them, to be put in and out."""

    def __init__(self, model: torch.nn.Module) -> None:
        names = ("base_layer.weight", "embed_tokens.weight")
        self.weights = [p for name, p in model.named_parameters() if name.endswith(names)]
        self.full = [p.data for p in self.weights]
        self.rough = [quantize_dequantize(data) for data in self.full]

    @contextmanager
    def __call__(self, rough: bool) -> Iterator[None]:
        for parameter, data in zip(self.weights, self.rough if rough else self.full, strict=True):
            parameter.data = data
        try:
            yield
        finally:
            for parameter, data in zip(self.weights, self.full, strict=True):
                parameter.data = data
