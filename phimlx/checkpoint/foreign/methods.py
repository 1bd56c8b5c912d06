"""The frameworks whose weights are decoded, by the `quant_method` of a config."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phimlx.checkpoint.foreign import awq, bitsandbytes, compressed_tensors, fp8, gptq
from phimlx.checkpoint.foreign.packed import PackedLayer, PackedWeight, misfit
from phimlx.checkpoint.tensors import FLOATING_DTYPES, Tensor, TensorInfo
from phimlx.errors import ConfigError, shortened
from phimlx.files import read_json

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What serves to round activations or the cache, which the weights are exact without.
ACTIVATION_PARTS = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "activation_scale_inv",
    "input_scale_ub",
    "k_scale",
    "v_scale",
    "q_scale",
)
# Where settings stood in older versions, and of which framework.
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One framework's way to quantize.

    Attributes:
        framework: that quantized, as people know it.
        marks: parts of which every packed layer has one.
        parts: that such a layer may have besides.
        read_layer: checks a layer's tensors and makes its weight of them.
        check_settings: refuses settings that are not followed.
        rounds_activations: tells from settings whether the framework rounds activations too.
    """

    framework: str
    marks: tuple[str, ...]
    parts: tuple[str, ...]
    read_layer: Callable[[PackedLayer, Settings], PackedWeight]
    check_settings: Callable[[Settings], None] = lambda settings: None
    rounds_activations: Callable[[Settings], bool] = lambda settings: False


METHODS: dict[str, Method] = {
    "awq": Method("AWQ", ("qweight",), ("qzeros", "scales"), awq.read_layer),
    "gptq": Method("GPTQ", ("qweight",), ("qzeros", "scales", "g_idx"), gptq.read_layer),
    "bitsandbytes": Method(
        "bitsandbytes",
        ("weight.absmax", "SCB"),
        (
            "weight",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
            "weight_format",
        ),
        bitsandbytes.read_layer,
        rounds_activations=lambda settings: settings.get("load_in_8bit") is True,
    ),
    "compressed-tensors": Method(
        "compressed-tensors",
        ("weight_packed", "weight_scale"),
        ("weight", "weight_shape", "weight_zero_point", "weight_g_idx"),
        compressed_tensors.read_layer,
        compressed_tensors.check_settings,
        compressed_tensors.rounds_activations,
    ),
    "fp8": Method(
        "fp8",
        ("weight_scale_inv", "weight_scale"),
        ("weight",),
        fp8.read_layer,
        rounds_activations=lambda settings: True,
    ),
    "fbgemm_fp8": Method(
        "fbgemm fp8",
        ("weight_scale",),
        ("weight",),
        fp8.read_fbgemm_layer,
        rounds_activations=lambda settings: True,
    ),
}


@dataclass(frozen=True)
class ForeignQuantization:
    """Another framework's quantization of a model, as its config tells of it.

    Attributes:
        name: of the framework, its `quant_method`.
        settings: `quantization_config`, or what its older files hold.
        dtype: of the model, which config.json names; None where it does not.
        place: where the settings stand.
    """

    name: str
    settings: Settings = field(repr=False)
    dtype: str | None
    place: str

    @classmethod
    def of(
        cls, config: Mapping[str, Any], place: str = "config.json: quantization_config"
    ) -> ForeignQuantization | None:
        """Read a config; None where it tells of none, or of MLX's."""
        settings = config.get("quantization_config")
        if config.get("quantization") is not None or settings is None:
            return None
        settings = settings if isinstance(settings, dict) else {}
        name = settings.get("quant_method")
        if name is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
            name = "bitsandbytes"
        named = config.get("dtype", config.get("torch_dtype"))
        dtype = DTYPES.get(named.removeprefix("torch.")) if isinstance(named, str) else None
        return cls(name.lower() if isinstance(name, str) else "", settings, dtype, place)

    @classmethod
    def of_folder(cls, folder: Path, config: Mapping[str, Any]) -> ForeignQuantization | None:
        """Read the file of settings that AutoGPTQ or AutoAWQ wrote before config.json held them.

        None where there is none, where it cannot be read, or where the config tells already.
        """
        if config.get("quantization") is not None:
            return None
        for file_name, name in OLDER_FILES.items():
            try:
                settings = read_json(folder / file_name)
            except ConfigError:
                continue
            settings = {"quant_method": name, **settings}
            return cls.of({**config, "quantization_config": settings}, file_name)
        return None

    @property
    def framework(self) -> str:
        """Name it as people know it."""
        if self.name in METHODS:
            return METHODS[self.name].framework
        return shortened(self.name).strip("'") if self.name else "not named"

    @property
    def bits(self) -> int | None:
        """Bits of a packed number, as the config tells; None where it does not."""
        if self.settings.get("load_in_4bit") is True:
            return 4
        if self.settings.get("load_in_8bit") is True or self.name in ("fp8", "fbgemm_fp8"):
            return 8
        return self._told("bits", "w_bit", "num_bits")

    @property
    def group_size(self) -> int | None:
        """Numbers that share a scale, as the config tells; None where it does not."""
        return self._told("group_size", "q_group_size")

    def _told(self, *keys: str) -> int | None:
        """Find a setting, or the one that all groups of compressed-tensors have."""
        places = [self.settings, *compressed_tensors.weight_settings(self.settings)]
        found = {value for place in places for key in keys if type(value := place.get(key)) is int}
        return found.pop() if len(found) == 1 and min(found) > 0 else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What of it does not go along, in sentences."""
        method = METHODS.get(self.name)
        if method is None or not method.rounds_activations(self.settings):
            return ()
        return (
            f"{method.framework} also rounds activations while it runs, which phimlx does not.",
        )

    def needs_conversion(self, folder: Path) -> ConfigError:
        """Make the error for running or training the model of a folder as it is."""
        return ConfigError(
            f"{self.place} is another framework's ({self.framework}), whose weights phimlx "
            "converts but does not run.",
            hint=f"Convert it: phimlx convert {shlex.quote(str(folder))} --mlx-path OUT -q",
        )

    def refusal(self) -> ConfigError | None:
        """Make the error for what phimlx cannot decode; None where it can."""
        if self.name in METHODS:
            try:
                METHODS[self.name].check_settings(self.settings)
            except ConfigError as error:
                return error
            return None
        return ConfigError(
            f"{self.place} is another framework's ({self.framework}), which phimlx does not read.",
            hint="Convert the original model: phimlx convert MODEL --mlx-path OUT -q",
        )

    def decoded(
        self, stored: Mapping[str, TensorInfo], width: Callable[[str], int]
    ) -> dict[str, Tensor]:
        """Put a decoded weight in the place of each layer's packed tensors.

        Args:
            stored: tensors by their stored names, of any type.
            width: numbers in a row of the weight that is stored under a path.

        Raises:
            ConfigError, CheckpointError: where it is not this framework's form.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        method = METHODS[self.name]
        layers = self._layers(method, stored)
        taken = {f"{path}.{part}" for path, parts in layers.items() for part in parts}
        found: dict[str, Tensor] = {
            name: info
            for name, info in stored.items()
            if name not in taken and name.rpartition(".")[2] not in ACTIVATION_PARTS
        }
        for name, tensor in found.items():
            if tensor.dtype not in FLOATING_DTYPES:
                why = f"it is stored as {tensor.dtype}, and nothing tells its scale"
                raise misfit(method.framework, name, why)
        for path, parts in layers.items():
            if f"{path}.weight" in found:
                raise misfit(method.framework, path, "it has a weight that is not packed as well")
            layer = PackedLayer(method.framework, path, parts, width(path), self.dtype)
            found[f"{path}.weight"] = method.read_layer(layer, self.settings)
        return found

    def _layers(
        self, method: Method, stored: Mapping[str, TensorInfo]
    ) -> dict[str, dict[str, TensorInfo]]:
        """Gather the parts of each packed layer, by its path."""
        paths = [
            name.removesuffix(f".{mark}")
            for name in stored
            for mark in method.marks
            if name.endswith(f".{mark}")
        ]
        known = (*method.marks, *method.parts)
        return {
            path: {part: stored[f"{path}.{part}"] for part in known if f"{path}.{part}" in stored}
            for path in dict.fromkeys(paths)
        }


def is_packed(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is packed, or belongs to one that is: its scale, its zero points."""
    path, _, part = name.rpartition(".")
    is_extra = f"{path}.weight" in stored and part not in ("weight", "bias")
    return is_extra or part in ACTIVATION_PARTS or stored[name].dtype not in FLOATING_DTYPES
