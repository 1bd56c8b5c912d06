"""Calibrated quantization: which method, on which text, and whether it serves this model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version

import mlx.core as mx

from convert.folder import Journal
from convert.quantize import layerwise
from convert.quantize.calibration import CalibrationWindows
from convert.quantize.dwq import STEP_TOKENS, dwq, sensitivities
from convert.quantize.recipe import Recipe, Rule
from convert.tensor_plan import TensorPlan
from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.errors import ConversionError
from phimlx.machine.memory import machine_memory
from phimlx.models import registry
from phimlx.sizes import size_text

Advance = Callable[[float], object]

NAMES = {"gptq": "GPTQ", "dwq": "DWQ", "sensitivity": "Bits by sensitivity"}
CALIBRATED_BITS = {
    "gptq": (2, 3, 4, 5, 6, 8),
    "dwq": (2, 3, 4, 5, 6),
    "sensitivity": (2, 3, 4, 5, 6),
}
HIGHER = {2: 4, 3: 5, 4: 6, 5: 8, 6: 8}  # what sensitivity gives the layers that need more


@dataclass(frozen=True)
class CalibrationSettings:
    """A method of calibrated quantization and its settings.

    Attributes:
        method: "gptq", which rounds each weight so that the rest of its row makes up for the error;
            "dwq", which trains scales and biases towards the original's logits; "sensitivity",
            which gives more bits to the layers where they count most.
        text: to calibrate on, in which control tokens are recognised; the bundled one where None.
        samples, length: windows of it, and tokens in each.
        steps, learning_rate: of DWQ's training.
        target_bits: bits per weight to reach by sensitivity, scales included.
        seed: of the order in which windows are read.

    Raises:
        ConversionError: for a value that makes no sense.
    """

    method: str
    text: str | None = None
    samples: int = 128
    length: int = 512
    steps: int = 512
    learning_rate: float = 1e-5
    target_bits: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in NAMES:
            raise ConversionError(
                f"There is no method {self.method!r}; there is {', '.join(NAMES)}."
            )
        least = {"samples": 8, "length": 32, "steps": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConversionError(
                    f"{name} is {getattr(self, name)}; it must be {bound} at least."
                )
        if not 0 < self.learning_rate < 1:
            raise ConversionError(
                f"learning_rate is {self.learning_rate}; it must be between 0 and 1."
            )
        if (self.target_bits is None) == (self.method == "sensitivity"):
            raise ConversionError(
                "target_bits says how large a model by sensitivity becomes: it goes with that "
                "method, which needs it."
            )


@dataclass(frozen=True)
class CalibrationPlan:
    """A calibration, checked against a model and a text, not yet begun.

    Attributes:
        recipe: what the weights are quantized to; for sensitivity the fewest bits of any layer.
        dtype: of scales and biases in the output.
        pending: whether it has still to be done.
    """

    settings: CalibrationSettings
    checkpoint: Checkpoint
    recipe: Recipe
    tensors: TensorPlan
    dtype: mx.Dtype
    windows: CalibrationWindows
    pending: bool = True

    @classmethod
    def of(
        cls,
        settings: CalibrationSettings,
        checkpoint: Checkpoint,
        recipe: Recipe | None,
        tensors: TensorPlan,
    ) -> CalibrationPlan:
        """Check everything that can be known before the first weight is read.

        Raises:
            ConversionError: where the method does not serve this model
                or recipe, or does not fit into this machine's memory.
        """
        name = NAMES[settings.method]
        architecture = registry.of_config(checkpoint.config)
        if architecture.takes_media:
            raise ConversionError(
                f"{name} calibrates on text alone, and {checkpoint.folder} is a "
                f"{architecture.model_type} model, which sees and hears as well.",
                hint="Convert it with -q alone.",
            )
        if checkpoint.quantization is not None:
            raise ConversionError(
                f"{name} calibrates the original weights, but {checkpoint.folder} is already "
                f"quantized, to {checkpoint.quantization['bits']} bits.",
                hint="Convert the original model.",
            )
        if checkpoint.foreign is not None:
            raise ConversionError(
                f"{name} calibrates the original weights, but {checkpoint.folder} is already "
                f"quantized, by {checkpoint.foreign.framework}.",
                hint="Convert the original model.",
            )
        if recipe is None:
            raise ConversionError(
                f"{name} quantizes, but no quantization is chosen.", hint="Add -q or --recipe."
            )
        check_recipe(settings, recipe)
        windows = CalibrationWindows.of(
            checkpoint,
            settings.text,
            settings.samples,
            settings.length,
            past_step=settings.method == "gptq",  # the others hold logits of a whole window
        )
        dtype = DTYPES[tensors.dtype] if tensors.dtype else mx.float32
        calibration = cls(settings, checkpoint, recipe, tensors, dtype, windows)
        calibration.check_target()
        calibration.check_memory()
        return calibration

    @property
    def digest(self) -> str:
        """Everything that decides the calibrated tensors, in a text."""
        return repr((replace(self.settings, text=None), self.windows.digest, version("mlx-lm")))

    @property
    def files(self) -> list[str]:
        """Files that it keeps in the folder while it goes on, so that it can be continued."""
        if self.settings.method != "gptq":
            return []
        return layerwise.calibration_files(build_model(self.checkpoint.config))

    @property
    def keep_after(self) -> tuple[type[BaseException], ...]:
        """Errors after which these files are worth keeping."""
        return (KeyboardInterrupt,) if self.files else ()

    def spare(self, nbytes: int) -> int:
        """Disk space that is needed besides weights of so many bytes, more or less."""
        if self.settings.target_bits is None:
            return nbytes if self.files else 0
        count = sum(tensor.size for tensor in self.tensors.conversions)
        return max(0, int(self.settings.target_bits * count / 8) - nbytes)

    @property
    def memory(self) -> int:
        """Bytes that it takes at most, estimated from shapes."""
        return ESTIMATES[self.settings.method](self)

    @property
    def announcement(self) -> str:
        """The memory that it needs and this machine has, in a sentence."""
        return (
            f"{NAMES[self.settings.method]} needs about {size_text(self.memory)} of memory for "
            f"this model, and this machine has {size_text(machine_memory())}."
        )

    def check_memory(self) -> None:
        """Raise `ConversionError` where this machine has too little."""
        available = machine_memory()
        if self.memory > available:
            needs = {name: estimate(self) for name, estimate in ESTIMATES.items()}
            least = min(needs, key=lambda name: needs[name])
            hint = "Leave --q-method out: plain quantization takes 250 MB."
            if needs[least] <= available:
                hint = f"--q-method {least} needs {size_text(needs[least])}."
            raise ConversionError(self.announcement, hint=hint)

    def check_target(self) -> None:
        """Raise `ConversionError` where bits by sensitivity cannot come to what is wanted."""
        target = self.settings.target_bits
        if target is None:
            return
        low, high = (
            bits_per_weight(self.checkpoint, self.recipe_with(paths), self.tensors.dtype)
            for paths in ((), tuple(self.tensors.layers))
        )
        if not low <= target <= high:
            bits = self.recipe.default.bits
            raise ConversionError(
                f"{target:g} bits per weight cannot be had from layers of {bits} and "
                f"{HIGHER[bits]} bits, which make {low:.2f} to {high:.2f}.",
                hint="Choose other --q-bits or another --q-target-bits.",
            )

    def recipe_with(self, paths: tuple[str, ...]) -> Recipe:
        """Make the recipe in which these layers have more bits."""
        default = self.recipe.default
        more = replace(default, bits=HIGHER[default.bits])
        name = f"sensitivity-{self.settings.target_bits:g}"
        return Recipe(name, default, tuple(Rule(path, more) for path in sorted(paths)))

    def choose_bits(self, advance: Advance) -> Recipe:
        """Make the recipe that gives more bits where the model is most sensitive.

        Args:
            advance: called with hundredths of this work.
        """
        low = self.recipe.default
        found = sensitivities(
            self.checkpoint,
            self.tensors.layers,
            self.windows.windows,
            low,
            replace(low, bits=HIGHER[low.bits]),
            advance,
        )
        chosen: tuple[str, ...] = ()
        for path in sorted(found, key=lambda path: -found[path]):
            recipe = self.recipe_with((*chosen, path))
            bits = bits_per_weight(self.checkpoint, recipe, self.tensors.dtype)
            if found[path] > 0 and bits <= (self.settings.target_bits or 0):
                chosen = (*chosen, path)
        return self.recipe_with(chosen)

    def run(self, journal: Journal, advance: Advance) -> dict[str, mx.array]:
        """Compute the tensors of every calibrated layer, under their names in the output.

        Args:
            journal: of the folder being filled, where GPTQ keeps each decoder layer that is done.
            advance: called with hundredths of this work.

        Raises:
            ConversionError: where a weight is not finite, or the model has become worse.
        """
        layers, windows = self.tensors.layers, self.windows.windows
        settings = self.settings
        if settings.method == "gptq":
            return layerwise.quantize_layer_by_layer(
                self.checkpoint, layers, windows, self.dtype, journal, advance
            )
        trained, before, after = dwq(
            self.checkpoint,
            layers,
            windows,
            self.dtype,
            settings.steps,
            settings.learning_rate,
            settings.seed,
            advance,
        )
        if not after < before:
            raise ConversionError(
                f"DWQ made the model no better: on text kept from training its KL divergence from "
                f"the original went from {before:.3g} to {after:.3g} nats.",
                hint="Choose a lower --learning-rate, or a longer calibration text.",
            )
        return trained

    def markdown(self) -> str:
        """A section for the model card."""
        found = self.windows
        settings: dict[str, float] = {"seed": self.settings.seed}
        if self.settings.method == "dwq":
            settings["steps"] = self.settings.steps
            settings["learning rate"] = self.settings.learning_rate
        if self.settings.target_bits is not None:
            settings["target bits per weight"] = self.settings.target_bits
        lengths = sorted({len(window) for window in found.windows})
        counts = [sum(len(window) == length for window in found.windows) for length in lengths]
        windows = " and ".join(
            f"{count} windows of {length} tokens"
            for count, length in zip(counts, lengths, strict=True)
        )
        text = "the text that comes with phimlx" if found.bundled else "a text of the maker's"
        values = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        return (
            f"\n## Calibrated quantization\n\n{NAMES[self.settings.method]} "
            f"on {windows} of {text} (SHA-256 `{found.digest}`); {values}.\n"
        )


def check_recipe(settings: CalibrationSettings, recipe: Recipe) -> None:
    """Raise `ConversionError` where a method does not calibrate weights of that form."""
    name, form = NAMES[settings.method], recipe.default
    if form.mode != "affine":
        raise ConversionError(
            f"{name} calibrates affine quantization, not {form.mode}.", hint="Leave --q-mode out."
        )
    bits = CALIBRATED_BITS[settings.method]
    if form.bits not in bits:
        raise ConversionError(
            f"{name} calibrates weights of {', '.join(map(str, bits[:-1]))} or {bits[-1]} bits, "
            f"not of {form.bits}.",
            hint="Choose other bits, or another --q-method.",
        )
    if settings.method == "sensitivity" and recipe.rules:
        raise ConversionError(
            f"{name} chooses the layers that get more bits: it goes with -q, not with a recipe.",
            hint="Choose -q and --q-target-bits instead of --recipe.",
        )


def bits_per_weight(checkpoint: Checkpoint, recipe: Recipe, dtype: str | None) -> float:
    """Compute the bits per weight of the whole output, scales and biases included."""
    tensors = TensorPlan.of(checkpoint, recipe, dtype).conversions
    nbytes = sum(array.nbytes for tensor in tensors for array in tensor.result().values())
    return 8 * nbytes / sum(tensor.size for tensor in tensors)


def _gptq_memory(plan: CalibrationPlan) -> int:
    """A decoder layer in float32, its widest matrix thrice more, a Hessian, its factors in float64,
    and states; or as much for the head."""
    config = build_model(plan.checkpoint.config).config
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 4 * hidden * (2 * hidden + 3 * inner)  # no more than that: heads may share keys
    layer += 4 * 3 * 2 * hidden * inner + 24 * max(hidden, inner) ** 2
    head = 0 if config.tie_word_embeddings else 4 * 4 * config.vocab_size * hidden
    stack = max(layerwise.BATCH_TOKENS, plan.windows.longest)
    states = 4 * (2 * plan.windows.size * hidden + stack * (6 * hidden + 4 * inner))
    return max(layer, head, 2 * config.vocab_size * hidden) + states


def _training_logits(plan: CalibrationPlan) -> int:
    """Logits of a step in float32: two models', their logarithms, a gradient, and room to work."""
    config = build_model(plan.checkpoint.config).config
    tokens = max(STEP_TOKENS, plan.windows.longest)
    layers = config.num_hidden_layers * config.hidden_size + 8 * config.intermediate_size
    return 4 * tokens * (6 * config.vocab_size + layers)


def _dwq_memory(plan: CalibrationPlan) -> int:
    """The quantized model, scales and biases six times in float32 (for the gradient, the optimizer
    and the stored type), the original's head, and hidden states."""
    config = build_model(plan.checkpoint.config).config
    packed, scales = 0, 0
    for tensor in plan.tensors.conversions:
        for name, array in tensor.result().items():
            packed += array.nbytes
            scales += 0 if name.endswith("weight") else array.size
    head = 4 * config.vocab_size * config.hidden_size
    states = 4 * 2 * plan.windows.size * config.hidden_size
    return packed + 6 * 4 * scales + head + states + _training_logits(plan)


def _sensitivity_memory(plan: CalibrationPlan) -> int:
    """Original, rounded weights, gradients and their sums in float32, and room for a new sum."""
    return 5 * 4 * sum(tensor.size for tensor in plan.tensors.conversions) + _training_logits(plan)


ESTIMATES: dict[str, Callable[[CalibrationPlan], int]] = {
    "gptq": _gptq_memory,
    "dwq": _dwq_memory,
    "sensitivity": _sensitivity_memory,
}
