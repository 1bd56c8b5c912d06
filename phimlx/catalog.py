"""The family as data: names, repositories, shapes, licences and sampling defaults of its models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Model:
    """One model of the family.

    Attributes:
        repo: where it was published; None for those that come with phimlx.
        quantized_repo: the same weights at 4 bits in groups of 64.
        parameters: as published, those included that the model does without.
        whole_parameters: those of them that a quantized model keeps at 16 bits too.
        full_layers: layers that keep keys and values of every token; all where None.
        constant_cache: numbers that a cache holds however long a sequence is, in the type of the
            computation and in float32.
        longrope_step: the length beyond which the long rope factors apply; None where there are
            none.
        base: whether it was trained to complete text, not to answer.
        chat_form: of a base model, the published prompt form in which it writes conversations.
        stored_itemsize: bytes of a number as published.
        good_at: what to take it for, in a few words.
        sampling: how its makers sample from it, under the names of `Phi.generate`; empty where
            they leave that to the user.
    """

    alias: str
    other_names: tuple[str, ...]
    repo: str | None
    quantized_repo: str | None
    parameters: int
    context_length: int
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    whole_parameters: int = 0
    full_layers: int | None = None
    constant_cache: tuple[int, int] = (0, 0)
    longrope_step: int | None = None
    reasoning: bool = False
    base: bool = False
    chat_form: str | None = None
    stored_itemsize: int = 2
    good_at: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)
    architecture: str = "phi3"
    licence: str = "MIT"

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that means this model."""
        repos = tuple(repo for repo in (self.repo, self.quantized_repo) if repo is not None)
        return (self.alias, *self.other_names, *repos)

    @property
    def kv_layers(self) -> int:
        """How many layers keep keys and values of every token."""
        return self.num_hidden_layers if self.full_layers is None else self.full_layers

    def constant_cache_bytes(self, itemsize: int) -> int:
        """Count the bytes that a cache takes however long a sequence is."""
        computed, float32 = self.constant_cache
        return itemsize * computed + 4 * float32

    @property
    def nbytes(self) -> int:
        """Size as published."""
        return self.stored_itemsize * self.parameters

    @property
    def quantized_nbytes(self) -> int:
        """Size at 4 bits in groups of 64, each with a 16-bit scale and bias: 4.5 bits a weight."""
        packed = self.parameters - self.whole_parameters
        return packed * 9 // 16 + 2 * self.whole_parameters

    @property
    def has_small_kin(self) -> bool:
        """Whether a small model that sees and hears as this one does comes along."""
        return self.architecture == "phi4mm"

    def has_shape_of(self, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` describes a model of this one's architecture and shape."""
        return (
            config.get("model_type") == self.architecture
            and config.get("num_hidden_layers") == self.num_hidden_layers
            and config.get("hidden_size") == self.hidden_size
            and config.get("vocab_size") == self.vocab_size
        )


# What the models of one size share.
PHI_4: dict[str, Any] = {
    "parameters": 14_659_507_200,
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_key_value_heads": 10,
    "head_dim": 128,
    "vocab_size": 100_352,
    "tied": False,
}
PHI_4_MINI: dict[str, Any] = {
    "parameters": 3_836_021_760,
    "context_length": 131_072,
    "num_hidden_layers": 32,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 200_064,
    "tied": True,
    "longrope_step": 4096,
}
# 9 Mamba layers of 5120 channels, 8 of attention in a window of 512 tokens, one of full attention.
PHI_4_MINI_FLASH: dict[str, Any] = {
    "parameters": 3_852_562_944,
    "context_length": 262_144,
    "num_hidden_layers": 32,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_key_value_heads": 20,
    "head_dim": 64,
    "vocab_size": 200_064,
    "tied": True,
    "full_layers": 1,
    "constant_cache": (8 * 512 * 2 * 20 * 64 + 9 * 3 * 5120, 9 * 5120 * 16),
}

PHI_3_MINI: dict[str, Any] = {
    "parameters": 3_821_079_552,
    "num_hidden_layers": 32,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_key_value_heads": 32,
    "head_dim": 96,
    "vocab_size": 32_064,
    "tied": False,
}
PHI_3_MEDIUM: dict[str, Any] = {
    **PHI_4,
    "parameters": 13_960_238_080,
    "vocab_size": 32_064,
}
LONG: dict[str, Any] = {"context_length": 131_072, "longrope_step": 4096}
PHI_1: dict[str, Any] = {
    "architecture": "phi",
    "parameters": 1_418_270_720,
    "context_length": 2048,
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "vocab_size": 51_200,
    "tied": False,
    "base": True,
}

NANO: dict[str, Any] = {
    "repo": None,
    "quantized_repo": None,
    "parameters": 2_361_600,
    "context_length": 1024,
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1536,
    "tied": True,
    "longrope_step": 128,
}

FAMILY: tuple[Model, ...] = (
    Model(
        alias="phi-4-mini",
        good_at="answers, code, tools; the usual one",
        repo="microsoft/Phi-4-mini-instruct",
        quantized_repo="mlx-community/Phi-4-mini-instruct-4bit",
        other_names=("phi-4-mini-instruct", "phi4-mini"),
        **PHI_4_MINI,
    ),
    Model(
        alias="phi-4-mini-reasoning",
        good_at="sums and proofs, thought through",
        repo="microsoft/Phi-4-mini-reasoning",
        quantized_repo="mlx-community/Phi-4-mini-reasoning-4bit",
        other_names=("phi4-mini-reasoning",),
        reasoning=True,
        sampling={"temperature": 0.8, "top_p": 0.95},
        **PHI_4_MINI,
    ),
    Model(
        alias="phi-4-mini-flash-reasoning",
        good_at="sums and proofs in long texts, quicker",
        repo="microsoft/Phi-4-mini-flash-reasoning",
        quantized_repo=None,  # nobody else's software for MLX runs it
        other_names=("phi-4-mini-flash", "phi4-mini-flash-reasoning", "phi4-mini-flash"),
        architecture="phi4flash",
        reasoning=True,
        sampling={"temperature": 0.6, "top_p": 0.95},
        **PHI_4_MINI_FLASH,
    ),
    Model(
        alias="phi-4",
        good_at="answers and code with more knowledge",
        repo="microsoft/phi-4",
        quantized_repo="mlx-community/phi-4-4bit",
        other_names=("phi4",),
        context_length=16_384,
        **PHI_4,
    ),
    Model(
        alias="phi-4-reasoning",
        good_at="hard sums, science, code, thought through",
        repo="microsoft/Phi-4-reasoning",
        quantized_repo="mlx-community/Phi-4-reasoning-4bit",
        other_names=("phi4-reasoning",),
        context_length=32_768,
        reasoning=True,
        sampling={"temperature": 0.8, "top_p": 0.95, "top_k": 50},
        **PHI_4,
    ),
    Model(
        alias="phi-4-reasoning-plus",
        good_at="the same, thinking longer",
        repo="microsoft/Phi-4-reasoning-plus",
        quantized_repo="mlx-community/Phi-4-reasoning-plus-4bit",
        other_names=("phi4-reasoning-plus",),
        context_length=32_768,
        reasoning=True,
        sampling={"temperature": 0.8, "top_p": 0.95, "top_k": 50},
        **PHI_4,
    ),
    Model(
        alias="phi-4-multimodal",
        good_at="pictures, sounds, speech to text",
        repo="microsoft/Phi-4-multimodal-instruct",
        quantized_repo=None,  # those that others made have the adapters merged into the base
        other_names=("phi-4-multimodal-instruct", "phi4-multimodal", "phi-4-mm"),
        architecture="phi4mm",
        **{
            **PHI_4_MINI,
            "parameters": 5_574_460_384,
            "whole_parameters": 5_574_460_384 - PHI_4_MINI["parameters"],  # encoders, adapters
        },
    ),
    Model(
        alias="phi-4-reasoning-vision",
        good_at="pictures, thought through",
        repo="microsoft/Phi-4-reasoning-vision-15B",
        quantized_repo=None,
        other_names=("phi-4-reasoning-vision-15b", "phi4-reasoning-vision"),
        architecture="phi4-siglip",
        context_length=32_768,
        reasoning=True,
        sampling={"temperature": 0.8, "top_p": 0.95},
        **{
            **PHI_4,
            "parameters": 15_119_518_144,
            "whole_parameters": 15_119_518_144 - PHI_4["parameters"],  # tower, projector
        },
    ),
    Model(
        alias="phi-3.5-mini",
        good_at="many languages, long texts",
        repo="microsoft/Phi-3.5-mini-instruct",
        quantized_repo="mlx-community/Phi-3.5-mini-instruct-4bit",
        other_names=("phi-3.5-mini-instruct", "phi3.5-mini"),
        **LONG,
        **PHI_3_MINI,
    ),
    Model(
        alias="phi-3-mini",
        good_at="short answers",
        repo="microsoft/Phi-3-mini-4k-instruct",
        quantized_repo="mlx-community/Phi-3-mini-4k-instruct-4bit",
        other_names=("phi-3-mini-4k-instruct", "phi-3-mini-4k", "phi3-mini"),
        context_length=4096,
        **PHI_3_MINI,
    ),
    Model(
        alias="phi-3-mini-128k",
        good_at="long texts",
        repo="microsoft/Phi-3-mini-128k-instruct",
        quantized_repo="mlx-community/Phi-3-mini-128k-instruct-4bit",
        other_names=("phi-3-mini-128k-instruct",),
        **LONG,
        **PHI_3_MINI,
    ),
    Model(
        alias="phi-3-medium",
        good_at="short answers with more knowledge",
        repo="microsoft/Phi-3-medium-4k-instruct",
        quantized_repo=None,
        other_names=("phi-3-medium-4k-instruct", "phi-3-medium-4k", "phi3-medium"),
        context_length=4096,
        **PHI_3_MEDIUM,
    ),
    Model(
        alias="phi-3-medium-128k",
        good_at="long texts with more knowledge",
        repo="microsoft/Phi-3-medium-128k-instruct",
        quantized_repo=None,
        other_names=("phi-3-medium-128k-instruct",),
        **LONG,
        **PHI_3_MEDIUM,
    ),
    Model(
        alias="phi-2",
        good_at="completing text and code",
        repo="microsoft/phi-2",
        quantized_repo=None,
        other_names=("phi2",),
        chat_form="phi-2-chat",
        **{
            **PHI_1,
            "parameters": 2_779_683_840,
            "num_hidden_layers": 32,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "head_dim": 80,
        },
    ),
    Model(
        alias="phi-1.5",
        good_at="completing text",
        repo="microsoft/phi-1_5",
        quantized_repo=None,
        other_names=("phi-1_5", "phi1.5"),
        chat_form="phi-1.5-chat",
        **PHI_1,
    ),
    Model(
        alias="phi-1",
        good_at="completing Python",
        repo="microsoft/phi-1",
        quantized_repo=None,
        other_names=("phi1",),
        stored_itemsize=4,
        **PHI_1,
    ),
    Model(
        alias="nano",
        other_names=("phi-4-nano",),
        good_at="trying phimlx out; comes along",
        **NANO,
    ),
    Model(
        alias="nano-multimodal",
        good_at="trying pictures and sounds out; comes along",
        other_names=("phi-4-nano-multimodal", "nano-mm"),
        architecture="phi4mm",
        **{**NANO, "parameters": 4_416_448, "whole_parameters": 4_416_448 - NANO["parameters"]},
    ),
)


@dataclass(frozen=True)
class Sibling:
    """A model of Microsoft's Phi family that phimlx does not run.

    Attributes:
        model_type: that its config.json names.
        others: what else its name may end with, in lower case.
        reason: what of it phimlx does not compute.
        instead: the alias of a model to use in its place.
    """

    name: str
    model_type: str
    others: tuple[str, ...]
    reason: str
    instead: str

    def refusal(self) -> tuple[str, str]:
        """Say that it does not run, and what to use."""
        return (
            f"{self.name} is not among the models that phimlx runs: {self.reason}.",
            f"Use {self.instead} in its place: phimlx download {self.instead}",
        )


SIBLINGS = (
    Sibling(
        name="Phi-3-small",
        model_type="phi3small",
        others=("phi-3-small-8k-instruct", "phi-3-small-128k-instruct", "phi3-small"),
        reason="its attention is block-sparse and its tokenizer one of its own",
        instead="phi-4-mini",
    ),
    Sibling(
        name="Phi-3.5-MoE",
        model_type="phimoe",
        others=("phi-3.5-moe-instruct", "phi3.5-moe", "phi-mini-moe-instruct",
                "phi-tiny-moe-instruct"),
        reason="its layers choose among experts",
        instead="phi-4",
    ),
    Sibling(
        name="Phi-3.5-vision",
        model_type="phi3_v",
        others=("phi-3.5-vision-instruct", "phi3.5-vision", "phi-3-vision",
                "phi-3-vision-128k-instruct", "phi3-vision"),
        reason="its image encoder is CLIP, which later models have left",
        instead="phi-4-multimodal",
    ),
)  # fmt: skip

_SIBLINGS = {
    name: sibling for sibling in SIBLINGS for name in (sibling.name.lower(), *sibling.others)
}

# Sizes that tell a model of the family from others in a layout that many share.
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size")

_BY_NAME = {name.lower(): model for model in FAMILY for name in model.names}

# What converters put behind a model's name: -4bit, -q8, -bf16, -mlx, -8bit-g32 …
_CONVERTED = re.compile(r"([-_.]?(mlx|q?\d{1,2}bits?|q\d|g\d+|bf16|fp16|float16|bfloat16))+$")


def find(name: str) -> Model | None:
    """The model that an alias, a repository or another known name means; case does not matter."""
    return _BY_NAME.get(name.strip().lower())


def sibling(name: str) -> Sibling | None:
    """Find the model that a name or a repository means, of those that do not run."""
    last = name.strip().rpartition("/")[2].lower()
    return _SIBLINGS.get(last) or _SIBLINGS.get(_CONVERTED.sub("", last))


def sibling_of_type(model_type: object) -> Sibling | None:
    """Find the model of a `model_type`, of those that do not run."""
    return next((each for each in SIBLINGS if each.model_type == model_type), None)


DEFAULT = _BY_NAME["phi-4-mini"]


def has_known_sizes(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json`, of whatever architecture, has the sizes of a model of the family."""
    return any(all(config.get(key) == getattr(model, key) for key in _SIZES) for model in FAMILY)


def by_config(config: Mapping[str, Any], folder_name: str = "") -> Model | None:
    """Find the model that a local folder holds; None where its name or its shape says otherwise.

    Args:
        config: its `config.json`, where `_name_or_path` may tell the model's name.
        folder_name: what else may tell it: `Phi-4-mini-instruct-4bit`, or its repository
            `microsoft/phi-4`; see `phimlx.hub.layout.model_name`.
    """
    for name in (config.get("_name_or_path"), folder_name):
        last = str(name or "").rstrip("/").rpartition("/")[2].lower()
        model = _BY_NAME.get(last) or _BY_NAME.get(_CONVERTED.sub("", last))
        if model is not None and model.has_shape_of(config):
            return model
    return None
