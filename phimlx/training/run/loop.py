"""A training run: steps, validations, sample replies, checkpoints, in an order that can resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_unflatten
from pydantic import ConfigDict, Field, TypeAdapter

from phimlx.errors import MachineLostError, TrainingError
from phimlx.machine.active_memory import ACTIVE_MEMORY, MemoryUse
from phimlx.machine.processes import ProcessGroup
from phimlx.models.base import CausalLM
from phimlx.training.data.batches import Batch, Batches, Example
from phimlx.training.forward import Features
from phimlx.training.run.checkpoints import (
    MANIFEST,
    DamagedCheckpoint,
    RunFolder,
    SavedCheckpoint,
    damaged,
)
from phimlx.training.run.events import (
    CheckpointSaved,
    CheckpointSkipped,
    Event,
    SampleReply,
    StepTaken,
    TrainingReport,
    Validation,
)
from phimlx.training.settings import TrainSettings
from phimlx.training.sharded import parts, shared_axes, whole, whole_shapes
from phimlx.training.step import StepResult, TrainingStep
from phimlx.training.together import machines_of

if TYPE_CHECKING:
    from phimlx.training.policy import Answering

EVALUATIONS = 10  # of a run, where nothing is said
CACHE_SHARE = 8  # freed buffers that MLX keeps for the next batch: at most 1/8 of the memory


@dataclass(frozen=True)
class TrainingPlan:
    """Length of a run, and how often it looks up. All counts are steps."""

    steps: int
    per_epoch: int
    eval_every: int
    save_every: int

    @classmethod
    def of(cls, settings: TrainSettings, batches: int) -> TrainingPlan:
        """Plan a run whose epochs have so many batches."""
        per_epoch = -(-batches // settings.grad_accumulation_steps)
        steps = settings.iters or max(1, round(settings.epochs * per_epoch))
        eval_every = settings.steps_per_eval or -(-steps // EVALUATIONS)
        return cls(steps, per_epoch, eval_every, settings.save_every or eval_every)


COMPLETE, STOPPED_EARLY, INTERRUPTED = "complete", "stopped early", "interrupted"


@dataclass(frozen=True)
class Outcome:
    """End of a run, and what it came to."""

    ending: str
    step: int
    best_step: int | None
    best_loss: float | None


# How pydantic reads them back, from files that anybody may have changed.
_READ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Amount = Annotated[float, Field(ge=0)]
_Metrics = Annotated[dict[Annotated[str, Field(max_length=100)], float], Field(max_length=20)]


@dataclass
class _Window:
    """Sums over the steps since the last report."""

    __pydantic_config__: ClassVar[ConfigDict] = _READ

    steps: _Count = 0
    weighted: float = 0.0
    weight: _Count = 0
    tokens: _Count = 0
    norm: _Amount = 0.0
    seconds: _Amount = 0.0
    metrics: _Metrics = field(default_factory=dict)

    def add(self, result: StepResult, seconds: float) -> None:
        self.steps += 1
        self.weighted += result.loss * result.weight
        self.weight += result.weight
        self.tokens += result.real_tokens
        self.norm = max(self.norm, result.gradient_norm)
        self.seconds += seconds
        for name, value in result.metrics.items():
            summed = self.metrics.get(name, 0.0) + value * result.weight
            self.metrics[name] = summed


@dataclass
class _State:
    """State that a checkpoint holds beside the arrays; the place in the data follows from the step.

    Attributes:
        stale: validations since the best one.
        ending: how the run ended; None while it can go on.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _READ

    step: _Count = 0
    best_step: _Count | None = None
    best_loss: float | None = None
    stale: _Count = 0
    seconds: _Amount = 0.0
    ending: str | None = None
    window: _Window = field(default_factory=_Window)

    @classmethod
    def of(cls, saved: SavedCheckpoint) -> _State:
        """Read what a checkpoint holds; raises TrainingError where it is not what was written."""
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(saved.state))
        except ValueError:
            state = None
        if state is None or state.step != saved.step:
            raise damaged(saved.folder / MANIFEST)
        return state


class TrainingRun:
    """Trains a model that `attach` has prepared, from wherever its folder says it has come to.

    Two runs of the same settings, data and model take the same steps, to the last bit on one
    device, however often one of them was stopped and taken up again.

    Args:
        train, valid: batches; no validation where the latter is None.
        run_folder: which the main process alone writes.
        sample_replies: the model's, after a validation, where some are wanted.
        skipped: checkpoints that were left out because they are damaged.
    """

    def __init__(
        self,
        step: TrainingStep,
        train: Batches,
        valid: Batches | None,
        settings: TrainSettings,
        run_folder: RunFolder,
        processes: ProcessGroup,
        sample_replies: Callable[[int], Iterator[SampleReply]] | None = None,
        skipped: Sequence[DamagedCheckpoint] = (),
    ) -> None:
        self.step = step
        self.train, self.valid = train, valid
        self.settings = settings
        self.run_folder = run_folder
        self.processes = processes
        self.sample_replies = sample_replies
        self.skipped = skipped
        self.axes = shared_axes(step.model)
        self.plan = TrainingPlan.of(settings, len(train))
        self.state = _State()

    def restore(self, saved: SavedCheckpoint) -> None:
        """Go on from a checkpoint; raises TrainingError where it is damaged."""
        self.state = _State.of(saved)
        trainable = self.step.model.trainable_parameters()
        self.step.optimizer.init(trainable)
        loaded = self.run_folder.load(
            saved,
            whole_shapes(trainable, self.axes),
            whole_shapes(self.step.optimizer.state, self.axes),
            self.processes,
        )
        weights, optimizer = (list(parts(each, self.axes).items()) for each in loaded)
        self.step.model.load_weights(weights, strict=False)
        self.step.optimizer.state = tree_unflatten(optimizer)
        mx.eval(self.step.model.trainable_parameters(), self.step.optimizer.state)

    def fit(
        self,
        on_event: Callable[[Event], object],
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Run to the end, or to the end of a step at which it was interrupted.

        Args:
            on_event: takes what happens, in the main process alone.
            stop_requested: asked after each step; the run then writes a checkpoint and ends.

        Raises:
            NonFiniteError: naming the row; weights and checkpoints are those from before.
            TrainingError: where a checkpoint cannot be written, or validation makes no number.
            MachineLostError: where another machine is gone.
        """
        emit = on_event if self.processes.is_main else lambda event: None
        for each in self.skipped:
            emit(CheckpointSkipped(each.step, each.reason))
        try:
            with self.processes.translate_errors(), _memory() as self._memory_use:
                self.step.model.train()
                if self.state.step == 0:
                    self._validate(emit)
                for batches in self._batches():
                    if self.state.ending is not None:
                        break
                    self._advance(batches, emit, stop_requested)
        except MachineLostError:
            if not self.axes:  # else the others have parts of what would be saved
                self._save(emit)  # a step that the others did not finish has changed nothing
            raise
        state = self.state
        return Outcome(state.ending or COMPLETE, state.step, state.best_step, state.best_loss)

    def _advance(
        self,
        batches: Sequence[Batch],
        emit: Callable[[Event], object],
        stop_requested: Callable[[], bool],
    ) -> None:
        """One step, and what follows it."""
        state, plan = self.state, self.plan
        started = time.perf_counter()
        result = self.step(state.step + 1, batches)
        seconds = time.perf_counter() - started
        state.step += 1
        state.seconds += seconds
        state.window.add(result, seconds)
        emit(StepTaken(state.step, result))
        last = state.step == plan.steps
        if last or state.step % self.settings.steps_per_report == 0:
            emit(self._report())
            state.window = _Window()
        is_best = False
        if last or state.step % plan.eval_every == 0:
            is_best = self._validate(emit)
        patience = self.settings.early_stop
        stop = self.processes.any(stop_requested())
        if last:
            state.ending = COMPLETE
        elif patience and state.stale >= patience:
            state.ending = STOPPED_EARLY
        if state.ending or stop or is_best or state.step % plan.save_every == 0:
            self._save(emit)
        if stop and state.ending is None:
            state.ending = INTERRUPTED

    def _batches(self) -> Iterator[Sequence[Batch]]:
        """The micro-batches of each step that is left."""
        size = self.settings.grad_accumulation_steps
        done, left = divmod(self.state.step, self.plan.per_epoch)
        start = self.state.step
        steps = (
            step
            for epoch in count(done)
            for step in _grouped(self.train.epoch(epoch, left * size if epoch == done else 0), size)
        )
        return islice(steps, self.plan.steps - start)

    def _report(self) -> TrainingReport:
        state, window = self.state, self.state.window
        return TrainingReport(
            step=state.step,
            epoch=state.step / self.plan.per_epoch,
            loss=window.weighted / window.weight,
            metrics={name: value / window.weight for name, value in window.metrics.items()},
            gradient_norm=window.norm,
            learning_rate=float(self.step.optimizer.learning_rate.item()),
            tokens=window.tokens,
            tokens_per_second=window.tokens / window.seconds,
            peak_memory=self._memory_use.peak,
            seconds=state.seconds,
            left=(self.plan.steps - state.step) * window.seconds / window.steps,
        )

    def _validate(self, emit: Callable[[Event], object]) -> bool:
        """Whether the loss on the validation data is the lowest since training began."""
        if self.valid is None:
            return False
        state, batches = self.state, self.settings.val_batches
        started = time.perf_counter()
        feed = self.valid.epoch(0)
        result = self.step.evaluate(feed if batches < 0 else islice(feed, batches))
        seconds = time.perf_counter() - started
        state.seconds += seconds
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"Step {state.step}: the validation loss is {result.loss}.",
                hint="Go on from the last checkpoint with a lower learning rate.",
            )
        best = state.step > 0 and (state.best_loss is None or result.loss < state.best_loss)
        if best:
            state.best_step, state.best_loss, state.stale = state.step, result.loss, 0
        elif state.step > 0:
            state.stale += 1
        emit(
            Validation(
                state.step, result.loss, result.metrics, result.supervised_tokens, best, seconds
            )
        )
        if self.sample_replies is not None and self.processes.is_main:
            for sample in self.sample_replies(state.step):
                emit(sample)
        return best

    def _save(self, emit: Callable[[Event], object]) -> None:
        state, step = self.state, self.step
        trees = step.model.trainable_parameters(), step.optimizer.state
        weights, optimizer = (whole(each, self.axes) for each in trees)
        if not self.processes.is_main:
            return
        self.run_folder.save(state.step, weights, optimizer, asdict(state), state.best_step)
        emit(CheckpointSaved(state.step, state.step == state.best_step))


def make_step(
    model: CausalLM,
    optimizer: optim.Optimizer,
    settings: TrainSettings,
    processes: ProcessGroup,
    features: Features | None = None,
    answering: Answering | None = None,
) -> TrainingStep:
    """Make what takes the steps by the method of the settings; the model is as it was before.

    Args:
        answering: how prompts are answered, where the method learns from that.
    """
    options: dict[str, Any] = {
        "clip": settings.clip or None,
        "checkpointing": settings.grad_checkpoint,
        "seed": settings.seed,
        "together": machines_of(model, processes.group),
        "features": features,
    }
    if settings.method == "sft":
        return TrainingStep(model, optimizer, **options)
    if answering is not None:
        from phimlx.training.policy import PolicyStep

        updates = settings.updates
        return PolicyStep(model, optimizer, settings.numbers, answering, updates, **options)
    from phimlx.training.preference import STEPS

    kind = STEPS[settings.learns_by.rows]
    return kind(model, optimizer, settings.method, settings.numbers, **options)


def make_batches(
    examples: Sequence[Example],
    settings: TrainSettings,
    processes: ProcessGroup,
    shuffled: bool = True,
) -> Batches:
    """Make the batches of some examples, in an order that the seed decides if `shuffled`."""
    kind = Batches
    if settings.method != "sft":
        from phimlx.training.preference import BATCHES

        kind = BATCHES.get(settings.learns_by.rows, Batches)
    # Machines that share the layers compute the same rows.
    rank, ranks = (0, 1) if settings.shard else (processes.rank, processes.size)
    return kind(
        examples,
        settings.batch_size,
        row_length=settings.max_seq_length if settings.pack else None,
        seed=settings.seed if shuffled else None,
        rank=rank,
        ranks=ranks,
    )


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[Sequence[Batch]]:
    while group := list(islice(batches, size)):
        yield group


@contextmanager
def _memory() -> Iterator[MemoryUse]:
    """Keep weights resident where the system can, and of freed buffers no more than a part."""
    from phimlx.machine.memory import machine_memory

    before = mx.set_cache_limit(machine_memory() // CACHE_SHARE)
    try:
        with ACTIVE_MEMORY.held() as use:
            yield use
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()
