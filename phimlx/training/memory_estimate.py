"""Estimate of the memory a run will take, told from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from phimlx.machine.memory import cache_bytes, footprint
from phimlx.models.cache.store import Store
from phimlx.models.config import ModelConfig
from phimlx.sizes import size_text
from phimlx.training.data.batches import Batch, rounded
from phimlx.training.loss import CHUNK_ROWS
from phimlx.training.settings import TrainSettings

FLOAT32 = 4  # bytes: adapters, their gradients and the loss are in float32 whatever the model is in

# What an optimizer keeps of every number that is trained.
MOMENTS = {"adamw": 2, "adam": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0}

# Arrays that are there at one time though no longer or not yet needed, for MLX lets some ten
# operations run ahead of each other. As measured on the CPU: in the backward pass of a layer, in
# widths of the network, scores and hidden states; of logits, by chunks up to a bound; of the
# largest matrix while the optimizer updates, at most so often the whole; of a trained head's
# gradient.
BACK = {"intermediate": 10, "scores": 2, "hidden": 10}
RECOMPUTED = {"intermediate": 5, "scores": 0, "hidden": 10}  # as well, with checkpointing
LOGITS_FIRST, LOGITS_MORE, LOGITS_MOST = 0.9, 1.6, 8.0
LOGITS_HALF = 1.4  # a 16-bit model's, beside the same in float32
UPDATES, UPDATES_MOST = 5, 3
HEAD_GRADIENTS = 3
DRAWN_LOGITS = 8  # arrays of the logits of answers that are drawn together, in float32


@dataclass(frozen=True)
class Drawing:
    """Answers that a model draws at one time, before it learns from them.

    Attributes:
        prompts: how many there are.
        read: tokens of the longest prompt.
        longest: tokens of the longest prompt with its answer.
        answers: to each prompt.
        together: of all of them, at most so many are drawn together.
    """

    prompts: int
    read: int
    longest: int
    answers: int
    together: int

    def nbytes(self, config: ModelConfig, itemsize: int) -> int:
        """Estimate what they take.

        That is keys and values, those of answers that have ended too, one layer's once more while
        a row joins or leaves, and logits; or what reading the prompts takes.
        """
        count = self.prompts * self.answers
        rows = min(count, self.together)
        columns = -(-self.longest // Store.step) * Store.step
        held = cache_bytes(config, rows * columns, itemsize)
        ended = cache_bytes(config, (count - rows) * self.longest, itemsize)
        logits = DRAWN_LOGITS * rows * config.vocab_size * FLOAT32
        reading = footprint(config, 0, self.prompts * self.read, itemsize)
        return max(held + held // config.kv_layers + ended + logits, reading.total)


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch of a run, this machine's part of it.

    Attributes:
        rows, length: of tokens.
        supervised: rows of logits, padding included.
        packed: whether a mask keeps examples apart.
        features: rows of pictures and sounds among the tokens.
        drawing: how answers of the model's own come, which are learned from; None where none are.
    """

    rows: int
    length: int
    supervised: int
    packed: bool = False
    features: int = 0
    drawing: Drawing | None = None

    @classmethod
    def of(cls, batch: Batch) -> LargestBatch:
        """Measure a batch."""
        rows, length = batch.tokens.shape
        features = sum(each.item.tokens for each in batch.media)
        return cls(rows, length, len(batch.target_indices), batch.segments is not None, features)

    def shrunk(self, rows: int, length: int) -> LargestBatch:
        """Return the same with other rows and columns, as far as all of it is learned alike."""
        share = rows * length / (self.rows * self.length)
        supervised = rounded(max(1, round(self.supervised * share)), CHUNK_ROWS)
        features = round(self.features * share)
        return replace(self, rows=rows, length=length, supervised=supervised, features=features)


@dataclass(frozen=True)
class MediaPlan:
    """What training with pictures and sounds adds.

    Attributes:
        ranks: of the adapters that are trained; the settings' alone where empty.
        projectors: numbers of the projections that are trained.
        encoding: bytes that encoding the largest picture or the longest sound takes; not while
            a step is taken.
        continues: whether no new adapter is trained, which could be taken out.
    """

    ranks: tuple[int, ...] = ()
    projectors: int = 0
    encoding: int = 0
    continues: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run takes at its peak.

    Attributes:
        weights: the model's, as stored.
        trained: adapters; nothing where the weights themselves are trained.
        optimizer: what it remembers of everything that is trained.
        gradients: of everything that is trained.
        activations: what layers keep for the backward pass.
        working: the most that comes and goes: logits, the backward pass of a layer, an update, or
            keys and values of answers that are drawn.
        masks: which tokens of packed rows see each other.
        reference: the weights from before training, where they are trained themselves and the
            method compares with them.
    """

    weights: int
    trained: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    masks: int
    reference: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def rows(self) -> list[tuple[str, str]]:
        """Return a table for a person."""
        return [(name, size_text(value)) for name, value in vars(self).items() if value] + [
            ("total", size_text(self.total))
        ]


def estimate_memory(
    config: ModelConfig,
    weights: int,
    settings: TrainSettings,
    batch: LargestBatch,
    itemsize: int = 2,
    media: MediaPlan = MediaPlan(),
) -> MemoryEstimate:
    """Estimate what a run needs.

    Args:
        weights: bytes of the model.
        itemsize: bytes of one number in the model's computation.
        media: what pictures and sounds add.
    """
    ranks = media.ranks or (settings.rank,)
    tokens = batch.rows * batch.length
    trained_layers = _trained_layers(config, settings)
    layer = _kept(config, settings, batch, itemsize, max(ranks)) * tokens
    full = settings.trains_whole_layers
    trained = _trained(config, settings, trained_layers, ranks) * (itemsize if full else FLOAT32)
    trained += media.projectors * FLOAT32
    widest = largest = max(width * height for width, height in config.projection_shapes.values())
    head_bytes = config.vocab_size * config.hidden_size * itemsize
    if full and settings.trains_every_layer:
        largest = max(largest, config.vocab_size * config.hidden_size)
        head_gradient = head_bytes
    else:
        head_gradient = 0

    units = {
        "intermediate": config.intermediate_size * itemsize,
        "scores": config.num_attention_heads * batch.length * itemsize,
        "hidden": config.hidden_size * itemsize,
    }
    # Layers before the first that is trained have no backward pass, and keep nothing.
    back = sum(BACK[name] * size for name, size in units.items()) * tokens
    activations = trained_layers * layer
    if settings.grad_checkpoint:
        activations = trained_layers * config.hidden_size * itemsize * tokens
        back += layer + sum(RECOMPUTED[name] * size for name, size in units.items()) * tokens
    chunks = -(-batch.supervised // CHUNK_ROWS)
    logits = CHUNK_ROWS * config.vocab_size * FLOAT32 * (LOGITS_HALF if itemsize < FLOAT32 else 1)
    loss = min(LOGITS_MOST, LOGITS_FIRST + LOGITS_MORE * chunks) * logits
    loss += HEAD_GRADIENTS * head_gradient
    if not settings.grad_checkpoint:
        loss += BACK["hidden"] * units["hidden"] * tokens
    if media.projectors:  # what comes to the second matrix, and what comes out
        activations += 4 * config.hidden_size * FLOAT32 * batch.features
    holds_own = full or media.continues
    gradients = trained * (2 if settings.grad_accumulation_steps > 1 else 1)
    if full:
        back += UPDATES * widest * itemsize
    # Gradients before clipping, new numbers for old ones; activations are gone by then.
    ahead = min(UPDATES * largest * itemsize, UPDATES_MOST * trained)
    update = 2 * trained + ahead - activations if full else 0
    # Activations are not there yet; of gradients the sum of earlier batches, where they add up.
    if batch.drawing:
        before = batch.drawing.nbytes(config, itemsize) - gradients
    else:
        before = media.encoding - trained
    return MemoryEstimate(
        weights=weights,
        trained=0 if full else trained,
        optimizer=MOMENTS[settings.optimizer] * trained,
        gradients=gradients,
        activations=activations,
        working=round(max(loss, back, update, before - activations)),
        masks=3 * batch.rows * batch.length**2 if batch.packed else 0,
        reference=trained if holds_own and settings.has_reference else 0,
    )


def remedies(
    config: ModelConfig,
    weights: int,
    settings: TrainSettings,
    batch: LargestBatch,
    itemsize: int,
    room: int,
    media: MediaPlan = MediaPlan(),
) -> Iterator[tuple[str, int]]:
    """Find what to change so that a run fits, and what it would need then: the mildest first."""
    checkpointing = settings.model_copy(update={"grad_checkpoint": True})
    options = [("--grad-checkpoint", checkpointing, batch, weights)]
    drawing = batch.drawing
    flag, most = ("group", settings.group_size) if drawing else ("batch", settings.batch_size)
    rows, fewest = batch.rows, 2 if drawing else 1
    while rows > fewest:
        rows //= 2
        less = batch.shrunk(rows, batch.length)
        if drawing:
            less = replace(less, drawing=replace(drawing, answers=rows))
        size = most * rows // batch.rows
        options.append((f"--grad-checkpoint --{flag}-size {size}", checkpointing, less, weights))
    length = batch.length
    while length > 256 and not drawing:
        length //= 2
        less = batch.shrunk(1, length)
        text = f"--grad-checkpoint --batch-size 1 --max-seq-length {length}"
        options.append((text, checkpointing, less, weights))
    for text, changed, less, nbytes in options:
        needed = estimate_memory(config, nbytes, changed, less, itemsize, media).total
        if needed <= room:
            yield text, needed
            return


def _kept(
    config: ModelConfig, settings: TrainSettings, batch: LargestBatch, itemsize: int, rank: int
) -> int:
    """Count the bytes that a layer keeps of each token for the backward pass."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    numbers = (
        4 * hidden  # what comes in, normed; what comes to the MLP, normed
        + config.mixer_numbers(batch.length)
        + 5 * intermediate  # gate, up, sigmoid, their products
    )
    kept = numbers * itemsize
    layers = [] if settings.trains_whole_layers else config.layer_shapes
    adapted = max((_adapted(shapes, settings) for shapes in layers), key=_inputs, default=[])
    kept += len(adapted) * rank * FLOAT32
    if itemsize < FLOAT32:
        kept += _inputs(adapted) * FLOAT32  # the adapters' input in their type
    if settings.fine_tune_type == "dora":
        kept += sum(height for _, height in adapted) * FLOAT32  # outputs before they are scaled
    return kept


def _inputs(adapted: Sequence[tuple[int, int]]) -> int:
    """Sum the widths of what projections of these shapes take."""
    return sum(width for width, _ in adapted)


def _adapted(
    shapes: Mapping[str, tuple[int, int]], settings: TrainSettings
) -> list[tuple[int, int]]:
    """Select the shapes of those of a layer's projections that get an adapter."""
    return [size for path, size in shapes.items() if settings.adapts(path)]


def _trained_layers(config: ModelConfig, settings: TrainSettings) -> int:
    """Count the layers from the first that is trained on."""
    if settings.layers is not None:
        return config.num_hidden_layers - settings.layers[0]
    return config.num_hidden_layers if settings.num_layers < 0 else settings.num_layers


def _trained(
    config: ModelConfig, settings: TrainSettings, layers: int, ranks: Sequence[int]
) -> int:
    """Count the numbers that are trained, given how many layers from the first of them on."""
    first = config.num_hidden_layers - layers
    last = config.num_hidden_layers if settings.layers is None else settings.layers[1] + 1
    chosen = config.layer_shapes[first:last]
    if not settings.trains_whole_layers:
        return sum(
            sum(ranks) * (width + height) + (height if settings.fine_tune_type == "dora" else 0)
            for shapes in chosen
            for width, height in _adapted(shapes, settings)
        )
    count = sum(width * height for shapes in chosen for width, height in shapes.values())
    count += len(chosen) * 2 * config.hidden_size
    if settings.trains_every_layer:
        heads = 1 if config.tie_word_embeddings else 2
        count += heads * config.vocab_size * config.hidden_size + config.hidden_size
    return count
