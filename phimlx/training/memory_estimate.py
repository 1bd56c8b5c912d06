"""How much memory a run will take, told from shapes before anything is loaded.

Knows shapes and bytes; knows nothing of files, and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

from phimlx.machine import memory
from phimlx.sizes import size_text
from phimlx.training.data.batches import Batch, rounded
from phimlx.training.loss import CHUNK_ROWS
from phimlx.training.settings import TrainSettings

FLOAT32 = 4  # bytes: adapters, their gradients and the loss are in float32 whatever the model is in

# What an optimizer keeps of every number that is trained.
MOMENTS = {"adamw": 2, "adam": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0}

# Arrays that are there at one time though no longer or not yet needed, for MLX lets some ten
# operations run ahead of each other. As measured on the CPU: on the way back through a layer, in
# widths of the network, scores and hidden states; of logits, by chunks up to a bound; of the
# largest matrix while the optimizer updates, at most so often the whole; of a trained head's
# gradient.
BACK = {"intermediate": 10, "scores": 2, "hidden": 10}
RECOMPUTED = {"intermediate": 5, "scores": 0, "hidden": 10}  # as well, with checkpointing
LOGITS_FIRST, LOGITS_MORE, LOGITS_MOST = 0.9, 1.6, 8.0
LOGITS_HALF = 1.4  # a 16-bit model's, beside the same in float32
UPDATES, UPDATES_MOST = 5, 3
HEAD_GRADIENTS = 3


class Shape(memory.Shape, Protocol):
    """What of a configuration decides."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class Load:
    """The largest batch of a run, this machine's part of it.

    Attributes:
        rows, length: of tokens.
        supervised: rows of logits, filling included.
        packed: whether a mask keeps examples apart.
    """

    rows: int
    length: int
    supervised: int
    packed: bool = False

    @classmethod
    def of(cls, batch: Batch) -> Load:
        rows, length = batch.tokens.shape
        return cls(rows, length, len(batch.picked), batch.segments is not None)

    def shrunk(self, rows: int, length: int) -> Load:
        """The same with other rows and columns, as far as all of it is learned alike."""
        share = rows * length / (self.rows * self.length)
        supervised = rounded(max(1, round(self.supervised * share)), CHUNK_ROWS)
        return replace(self, rows=rows, length=length, supervised=supervised)


@dataclass(frozen=True)
class Forecast:
    """Bytes that a run takes at its peak.

    Attributes:
        weights: the model's, as stored.
        trained: adapters; nothing where the weights themselves are trained.
        optimizer: what it remembers of everything that is trained.
        gradients: of everything that is trained.
        activations: what layers keep for the way back.
        working: the most that comes and goes: logits, a layer on its way back, or an update.
        masks: which tokens of packed rows see each other.
    """

    weights: int
    trained: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    masks: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def rows(self) -> list[tuple[str, str]]:
        """A table for a person."""
        return [(name, size_text(value)) for name, value in vars(self).items() if value] + [
            ("total", size_text(self.total))
        ]


def forecast(
    shape: Shape, weights: int, settings: TrainSettings, load: Load, itemsize: int = 2
) -> Forecast:
    """What a run needs.

    Args:
        weights: bytes of the model.
        itemsize: bytes of one number in the model's computation.
    """
    tokens = load.rows * load.length
    widths = _Widths.of(shape)
    layer = _kept(shape, widths, settings, load, itemsize) * tokens
    trained_layers = _trained_layers(shape, settings)
    full = settings.trains_whole_layers
    trained = _trained(shape, widths, settings, trained_layers) * (itemsize if full else FLOAT32)
    widest = largest = max(width * height for width, height in widths.projections.values())
    head_bytes = shape.vocab_size * shape.hidden_size * itemsize
    if full and settings.trains_every_layer:
        largest = max(largest, shape.vocab_size * shape.hidden_size)
        head_gradient = head_bytes
    else:
        head_gradient = 0

    units = {
        "intermediate": shape.intermediate_size * itemsize,
        "scores": shape.num_attention_heads * load.length * itemsize,
        "hidden": shape.hidden_size * itemsize,
    }
    # Layers before the first that is trained are not gone back through, and keep nothing.
    back = sum(BACK[name] * size for name, size in units.items()) * tokens
    activations = trained_layers * layer
    if settings.grad_checkpoint:
        activations = trained_layers * shape.hidden_size * itemsize * tokens
        back += layer + sum(RECOMPUTED[name] * size for name, size in units.items()) * tokens
    chunks = -(-load.supervised // CHUNK_ROWS)
    logits = CHUNK_ROWS * shape.vocab_size * FLOAT32 * (LOGITS_HALF if itemsize < FLOAT32 else 1)
    loss = min(LOGITS_MOST, LOGITS_FIRST + LOGITS_MORE * chunks) * logits
    loss += HEAD_GRADIENTS * head_gradient
    if not settings.grad_checkpoint:
        loss += BACK["hidden"] * units["hidden"] * tokens
    gradients = trained * (2 if settings.grad_accumulation_steps > 1 else 1)
    if full:
        back += UPDATES * widest * itemsize
    # Gradients before clipping, new numbers for old ones; activations are gone by then.
    ahead = min(UPDATES * largest * itemsize, UPDATES_MOST * trained)
    update = 2 * trained + ahead - activations if full else 0
    return Forecast(
        weights=weights,
        trained=0 if full else trained,
        optimizer=MOMENTS[settings.optimizer] * trained,
        gradients=gradients,
        activations=activations,
        working=round(max(loss, back, update)),
        masks=3 * load.rows * load.length**2 if load.packed else 0,
    )


def remedies(
    shape: Shape, weights: int, settings: TrainSettings, load: Load, itemsize: int, room: int
) -> Iterator[tuple[str, int]]:
    """What to change so that a run fits, and what it would need then: the mildest first."""
    checkpointing = settings.model_copy(update={"grad_checkpoint": True})
    options = [("--grad-checkpoint", checkpointing, load, weights)]
    rows = load.rows
    while rows > 1:
        rows //= 2
        less = load.shrunk(rows, load.length)
        size = settings.batch_size * rows // load.rows
        options.append((f"--grad-checkpoint --batch-size {size}", checkpointing, less, weights))
    length = load.length
    while length > 256:
        length //= 2
        less = load.shrunk(1, length)
        text = f"--grad-checkpoint --batch-size 1 --max-seq-length {length}"
        options.append((text, checkpointing, less, weights))
    for text, changed, less, nbytes in options:
        needed = forecast(shape, nbytes, changed, less, itemsize).total
        if needed <= room:
            yield text, needed
            return


@dataclass(frozen=True)
class _Widths:
    """Input and output of each projection of a layer."""

    projections: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, shape: Shape) -> _Widths:
        attention = shape.num_attention_heads * shape.head_dim
        keys = 2 * shape.num_key_value_heads * shape.head_dim
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        return cls(
            {
                "qkv_proj": (hidden, attention + keys),
                "o_proj": (attention, hidden),
                "gate_up_proj": (hidden, 2 * intermediate),
                "down_proj": (intermediate, hidden),
            }
        )

    def adapted(self, settings: TrainSettings) -> list[tuple[int, int]]:
        return [
            size
            for name, size in self.projections.items()
            if not settings.targets
            or any(fnmatchcase(name, each.rpartition(".")[2]) for each in settings.targets)
        ]


def _kept(shape: Shape, widths: _Widths, settings: TrainSettings, load: Load, itemsize: int) -> int:
    """Bytes that a layer keeps of each token for the way back."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    attention = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    numbers = (
        4 * hidden  # what comes in, normed; what comes to the MLP, normed
        + (attention + 2 * keys)  # queries, keys and values
        + (attention + keys)  # rotated
        + shape.num_attention_heads * load.length  # scores
        + 2 * attention  # what comes of them, and with heads side by side
        + 5 * intermediate  # gate, up, sigmoid, their products
    )
    kept = numbers * itemsize
    adapted = widths.adapted(settings) if not settings.trains_whole_layers else []
    kept += len(adapted) * settings.rank * FLOAT32
    if itemsize < FLOAT32:
        kept += sum(width for width, _ in adapted) * FLOAT32  # the adapters' input in their type
    if settings.fine_tune_type == "dora":
        kept += sum(height for _, height in adapted) * FLOAT32  # outputs before they are scaled
    return kept


def _trained_layers(shape: Shape, settings: TrainSettings) -> int:
    """Layers from the first that is trained on."""
    if settings.layers is not None:
        return shape.num_hidden_layers - settings.layers[0]
    return shape.num_hidden_layers if settings.num_layers < 0 else settings.num_layers


def _trained(shape: Shape, widths: _Widths, settings: TrainSettings, layers: int) -> int:
    """How many numbers are trained."""
    if settings.layers is not None:
        layers = settings.layers[1] - settings.layers[0] + 1
    if not settings.trains_whole_layers:
        sizes = [
            settings.rank * (width + height) + (height if settings.fine_tune_type == "dora" else 0)
            for width, height in widths.adapted(settings)
        ]
        return layers * sum(sizes)
    inside = sum(width * height for width, height in widths.projections.values())
    count = layers * (inside + 2 * shape.hidden_size)
    if settings.trains_every_layer:
        heads = 1 if shape.tie_word_embeddings else 2
        count += heads * shape.vocab_size * shape.hidden_size + shape.hidden_size
    return count
