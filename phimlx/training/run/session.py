"""Settings -> a run that is ready to go: its data, what it will need, its model and its folder.

What costs nothing is found and checked first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mlx.optimizers import Optimizer

import phimlx
from phimlx import catalog
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, needed_tensors
from phimlx.checkpoint.tensors import Tensor
from phimlx.errors import TrainingError
from phimlx.files import is_file, translate_read_errors
from phimlx.hub.content_hash import content_hash
from phimlx.hub.layout import cache_folder, model_name
from phimlx.machine.processes import ProcessGroup
from phimlx.media.limits import Limits
from phimlx.models.base import CausalLM
from phimlx.models.config import ModelConfig
from phimlx.models.tensor_parallel import shared_config, shared_sizes
from phimlx.options import override, read
from phimlx.shared_model import Peers
from phimlx.training.data.batches import Batches, Example, rounded
from phimlx.training.data.examples import Dataset, RowSettings, load_data
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.rows import Progress
from phimlx.training.loss import CHUNK_ROWS
from phimlx.training.memory_estimate import (
    Drawing,
    LargestBatch,
    MemoryEstimate,
    estimate_memory,
    remedies,
)
from phimlx.training.rewards import Reward, fingerprints, needs_answers, read_rewards
from phimlx.training.run.checkpoints import ENDED, RUN, RunFolder, SavedCheckpoint
from phimlx.training.run.checks import (
    can_share,
    check_answers,
    check_numbers,
    check_prompts,
    check_shared,
)
from phimlx.training.run.loop import TrainingPlan, TrainingRun, make_batches, make_step
from phimlx.training.run.media import encoded_media, media_plan
from phimlx.training.settings import TrainSettings
from phimlx.training.step import TrainingStep

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.training.features import EncodedMedia
    from phimlx.training.policy import Answering

MAX_TOKENS = 2048  # of a row, where nothing is said and the model holds as many
VALID_FRACTION = 0.05  # of the rows, where nothing is said and the data has no valid file
COMMANDS = ("train", "distill")
AnySettings = TypeVar("AnySettings", bound=TrainSettings)

ROOMY = 0.85  # part of the memory below which a forecast is no matter for a warning


@dataclass
class Session:
    """One run, from its settings on.

    Attributes:
        folder: the model's.
        resumed: what the folder of a run to go on with says of it; None for a new run.
        limits: of pictures, sounds and videos.
        features: finds those of pictures and sounds, from `run` on.
        takes_media: whether rows may hold any, where the model takes them.
        rewards: of answers, once they have been checked.
        on_answers: told how far the answers of a step have come, and how many there will be.
        answering: how prompts are answered, once there is a model, where the method does that.
    """

    settings: TrainSettings
    folder: Path
    processes: ProcessGroup
    resumed: Mapping[str, Any] | None = None
    limits: Limits | None = None
    features: EncodedMedia | None = field(default=None, init=False)

    takes_media: ClassVar[bool] = True
    rewards: Sequence[Reward] = ()
    on_answers: Callable[[int, int], object] = lambda done, total: None
    answering: Answering | None = None

    def __post_init__(self) -> None:
        if self.settings.max_seq_length is None:
            longest = min(MAX_TOKENS, self.config.max_position_embeddings)
            self.settings = self.settings.model_copy(update={"max_seq_length": longest})

    @cached_property
    def checkpoint(self) -> Checkpoint:
        checkpoint = Checkpoint(self.folder)
        checkpoint.check_runs()
        return checkpoint

    @cached_property
    def config(self) -> ModelConfig:
        """The model's, or that of the part of it that this machine has."""
        config = self._empty.config
        return shared_config(config, self.processes.size) if self.settings.shard else config

    @cached_property
    def encoder(self) -> RowEncoder:
        known = catalog.by_config(self.checkpoint.config, model_name(self.folder))
        name = known.alias if known else self.folder.resolve().name
        model = self._empty if self.takes_media else None
        return RowEncoder.load(self.folder, name, model, self.limits)

    @cached_property
    def _empty(self) -> CausalLM:
        """The model without its weights."""
        return build_model(self.checkpoint.config)

    @cached_property
    def run_folder(self) -> RunFolder:
        return RunFolder(Path(self.settings.adapter_path), self.settings.keep)

    def check(self) -> None:
        """Raise TrainingError where settings do not fit each other, the model or the folder."""
        settings, longest = self.settings, self.config.max_position_embeddings
        if settings.data is None:
            raise TrainingError(
                "There is no data to learn from.", hint="Name it: --data FILE, folder or Hub id."
            )
        if (settings.max_seq_length or 0) > longest:
            raise TrainingError(
                f"max_seq_length is {settings.max_seq_length:,}, but the model holds {longest:,} "
                "tokens."
            )
        if settings.shard:
            check_shared(settings, self._empty, self.processes.size, self.resumed is not None)
        if self.resumed is None:
            check_numbers(settings)
            check_prompts(settings)
        self.rewards = read_rewards(settings.reward, self._strangers)
        if self.resumed is None and self.processes.is_main:
            self.run_folder.refuse_existing()

    def load_model(self) -> Phi:
        """Load the model, or this machine's part of it."""
        from phimlx import api

        shared = self.settings.shard and self.processes.group is not None
        return api.load(self.folder, machines=Peers(self.processes) if shared else None)

    def load_data(self, on_progress: Progress = lambda done, total: None) -> dict[str, Dataset]:
        """Read and check all data; see `phimlx.training.data.examples.load_data`."""
        settings = self.settings
        found = load_data(
            self.source,
            self.encoder,
            self.row_settings,
            held_out=settings.valid_fraction or None,
            seed=settings.seed,
            on_progress=on_progress,
        )
        if needs_answers(settings.reward):
            check_answers(found)
        several = len(set(found["train"].rows)) > 1
        if "valid" not in found and settings.valid_fraction is None and several:
            found["train"], found["valid"] = found["train"].hold_out(VALID_FRACTION, settings.seed)
        return found

    # What another kind of run replaces.

    @property
    def source(self) -> str:
        """The data to learn from, as a person names it."""
        return self.settings.data or ""

    @property
    def row_settings(self) -> RowSettings:
        """How its rows become examples."""
        settings = self.settings
        return RowSettings(
            loss_on=settings.loss_on,
            max_length=(settings.max_seq_length or 0) - self._room,
            overlong=settings.overlong,
            mapping=settings.mapping,
            form=settings.learns_by.rows,
            question=settings.prompt,
            media_root=None if settings.media_root is None else Path(settings.media_root),
        )

    def make_step(self, model: CausalLM, optimizer: Optimizer) -> TrainingStep:
        """Make what takes the steps."""
        return make_step(
            model, optimizer, self.settings, self.processes, self.features, self.answering
        )

    def batches(self, data: Mapping[str, Dataset]) -> tuple[Batches, Batches | None]:
        """Make the batches to learn from, shuffled, and those to validate on, in a fixed order."""
        train = make_batches(data["train"].examples, self.settings, self.processes)
        if "valid" not in data:
            return train, None
        examples = data["valid"].examples
        return train, make_batches(examples, self.settings, self.processes, shuffled=False)

    def largest_batch(self, data: Mapping[str, Dataset]) -> LargestBatch:
        """Return the largest batch: the first in the order that is not shuffled."""
        examples = _learned_from(data)
        if self._room:
            from phimlx.training.policy import AT_ONCE

            size, prompts = self.settings.group_size, self.settings.batch_size
            read = max(len(example.tokens) for example in examples)
            longest = read - 1 + self._room
            mine = -(-prompts // self.processes.size)
            supervised = rounded(size * self._room, CHUNK_ROWS)
            drawing = Drawing(mine, read, longest, size, AT_ONCE)
            return LargestBatch(size, rounded(longest, 8), supervised, drawing=drawing)
        batches = make_batches(examples, self.settings, self.processes, shuffled=False)
        return LargestBatch.of(next(batches.epoch(0)))

    @property
    def _room(self) -> int:
        """Tokens that the model adds to a row."""
        return self.settings.max_tokens if self.settings.learns_by.rows == "prompts" else 0

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the model's computation: its norms are stored so."""
        vectors = (info for info in self._tensors.values() if len(info.shape) == 1)
        return 4 if any(info.dtype == "F32" for info in vectors) else 2

    @property
    def weights(self) -> int:
        """Bytes of the model's weights, as far as this machine has them."""
        sharding = self._empty.architecture.sharding if self.settings.shard else None
        sizes = {name: info.nbytes for name, info in self._tensors.items()}
        if sharding is not None:
            sizes = shared_sizes(sharding, sizes, self.processes.size)
        return sum(sizes.values())

    def estimate_memory(self, data: Mapping[str, Dataset]) -> MemoryEstimate:
        """The memory that the run will need."""
        batch = self.largest_batch(data)
        media = media_plan(self._empty, self.settings, _learned_from(data), self.itemsize)
        return estimate_memory(
            self.config, self.weights, self.settings, batch, self.itemsize, media
        )

    def check_memory(self, data: Mapping[str, Dataset], memory: int) -> str | None:
        """A warning where the run will hardly fit into so many bytes; None where it will.

        Raises:
            TrainingError: where it will not, with what to change.
        """
        from phimlx.sizes import size_text

        needed = self.estimate_memory(data).total
        if needed <= ROOMY * memory:
            return None
        said = (
            f"The run is expected to need {size_text(needed)} of memory; this machine has "
            f"{size_text(memory)} for it"
        )
        arguments = (
            self.config,
            self.weights,
            self.settings,
            self.largest_batch(data),
            self.itemsize,
        )
        media = media_plan(self._empty, self.settings, _learned_from(data), self.itemsize)
        found = next(remedies(*arguments, round(ROOMY * memory), media), None)
        hint = "Take a model at 4 bits (phimlx convert -q), or a smaller one."
        if can_share(self.settings, self._empty) and not self.settings.shard:
            hint = f"{hint[:-1]}, or share it among several machines (--shard)."
        if found is not None:
            hint = f"With {found[0]} it would need {size_text(found[1])}."
        if needed <= memory:
            return f"{said}. {hint}"
        raise TrainingError(f"{said}.", hint=f"{hint} To try all the same: --ignore-memory.")

    def description(self, data: Mapping[str, Dataset]) -> dict[str, Any]:
        """Describe the run, as its folder keeps it."""
        return {
            "phimlx": phimlx.__version__,
            "command": self.settings.command,
            "settings": self.settings.as_object(),
            "model": fingerprint(self.folder),
            "data": {name: each.fingerprint for name, each in data.items() if name != "test"},
            "machines": self.processes.size,
            "rewards": fingerprints(self.settings.reward),
        }

    def run(
        self,
        phi: Phi,
        data: Mapping[str, Dataset],
        note: Callable[[str], object] = lambda text: None,
    ) -> TrainingRun:
        """Prepare the model and its folder, which is to be held from here on.

        Args:
            note: called with a sentence where features of pictures and sounds cannot be kept.

        Raises:
            TrainingError: where model, data or settings are not those of the run to go on with, or
                that run is complete.
        """
        from phimlx.adapters.adapter import Base
        from phimlx.adapters.mlx_lm import adapter_config
        from phimlx.training.run.sample_replies import SampleReplies
        from phimlx.training.schedule import make_optimizer
        from phimlx.training.trainable import adapter_of, attach

        description = self.description(data)
        saved, skipped = None, []
        if self.resumed is not None:
            _check_same_run(self.resumed, description)
            saved = self._last_checkpoint()
            skipped = self.run_folder.damaged(saved.step if saved else 0)
        held = held_by(data)
        attach(phi.model, self.settings, held)
        train, valid = self.batches(data)
        steps = TrainingPlan.of(self.settings, len(train)).steps * self.settings.updates
        self.answering = self._answering(phi) if self._room else None
        self.features = encoded_media(
            phi.model, self.encoder.media, self.settings, description["model"], note
        )
        step = self.make_step(phi.model, make_optimizer(self.settings, steps))
        sample_replies = None
        if self.settings.sample_prompts and "valid" in data:
            assert phi.tokenizer is not None  # the codec has found one
            examples = data["valid"].examples[: self.settings.sample_prompts]
            sample_replies = SampleReplies(
                phi.model, phi.tokenizer, phi.eos, examples, self.encoder.media
            )
        run = TrainingRun(
            step,
            train,
            valid,
            self.settings,
            self.run_folder,
            self.processes,
            sample_replies=sample_replies,
            skipped=skipped,
        )
        if saved is not None:
            run.restore(saved)
            if self.processes.is_main and run.state.ending is not None:
                # It was killed between its last checkpoint and its end.
                best = run.state.best_step
                self.run_folder.publish(saved.step if best is None else best)
                self.run_folder.forget(best)
        elif self.processes.is_main:
            base = Base.of(self.folder, self.checkpoint.config)
            adapter = adapter_of(phi.model, self.settings, base, held)
            self.run_folder.begin(description, adapter_config(adapter))
        return run

    def _answering(self, phi: Phi) -> Answering:
        from phimlx.training.policy import Answering

        assert phi.tokenizer is not None  # the codec has found one
        settings = self.settings
        return Answering(
            phi.tokenizer,
            phi.eos,
            self.rewards,
            settings.group_size,
            settings.max_tokens,
            settings.seed,
            self.on_answers,
        )

    @property
    def _strangers(self) -> list[Path]:
        """Folders from which no code is run: models and data sets come from anywhere."""
        data = Path(self.settings.data or "").expanduser()
        return [self.folder, *([data] if data.is_dir() else []), cache_folder()]

    def _last_checkpoint(self) -> SavedCheckpoint | None:
        """Return the newest whole checkpoint."""
        last = self.run_folder.checkpoints()[-1:]
        # The main process's folder counts; the others need none.
        found = self.processes.broadcast_json([(each.step, each.state) for each in last])
        if not found:
            return None
        step, state = found[0]
        if self.resumed is not None and ENDED in self.resumed:
            raise TrainingError(
                f"The run in {self.run_folder.path} is {state['ending']}: it took {step:,} steps.",
                hint="Its adapter is there. Choose another --adapter-path for another run.",
            )
        return last[0] if last else SavedCheckpoint(self.run_folder.path, step, state)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return needed_tensors(self.checkpoint, self._empty)


def held_by(data: Mapping[str, Dataset]) -> frozenset[str]:
    """What the rows to learn from and to validate on hold; see `Example.held`."""
    return frozenset().union(*(example.held for example in _learned_from(data)))


def _learned_from(data: Mapping[str, Dataset]) -> list[Example]:
    """The examples to learn from and those to validate on."""
    return [each for name in ("train", "valid") if name in data for each in data[name].examples]


def resumed_settings(about: Mapping[str, Any], given: AnySettings) -> AnySettings:
    """Return the settings of a run to go on with, and what was given now in their place.

    Raises:
        TrainingError: where something else was given that decides about losses, or the run is
            another command's.
    """
    kind, command = type(given), about.get("command", TrainSettings.command)
    if command != kind.command:
        other = command if command in COMMANDS else "another command"
        raise TrainingError(
            f"The run to go on with was begun by phimlx {other}.",
            hint=f"Go on with it by the same: phimlx {other} --resume",
        )
    defaults = kind().as_object()
    kept = {
        name: value
        for name, value in about["settings"].items()
        if name in defaults and value != defaults[name]
    }
    before = read(kind, kept, RUN)
    settings = override(before, given)
    differences = settings.differences(before)
    if differences:
        raise TrainingError(
            f"This is another run than the one to go on with: {'; '.join(differences)}.",
            hint="Leave out what differs, or choose another --adapter-path for a new run.",
        )
    return settings


def fingerprint(folder: Path) -> str:
    """SHA-256 that tells a model from another: names and contents of its config, its tokenizer and
    its weights.

    Raises:
        TrainingError: where a file cannot be read.
    """
    names = [folder / name for name in ("config.json", "tokenizer.json")]
    digest = hashlib.sha256()
    with translate_read_errors(folder, TrainingError):
        for path in [*filter(is_file, names), *Checkpoint(folder).files]:
            digest.update(f"{path.relative_to(folder)} {content_hash(path)}\n".encode())
    return digest.hexdigest()


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    hint = "Take what the run began with, or choose another --adapter-path for a new run."
    if before["model"] != now["model"]:
        raise TrainingError("The model is not the one that the run began with.", hint=hint)
    if before.get("rewards", {}) != now["rewards"]:
        raise TrainingError("A file that rewards answers has changed.", hint=hint)
    for name, what in (("train", "training"), ("valid", "validation")):
        if before["data"].get(name) != now["data"].get(name):
            raise TrainingError(
                f"The {what} data is not what the run began with.",
                hint=hint,
            )
