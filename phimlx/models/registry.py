"""Every architecture that phimlx runs, each as one record.

A record names its classes instead of holding them, so that reading it imports no MLX: `phimlx list`
and the catalogue ask records too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from phimlx import catalog
from phimlx.errors import ConfigError, shortened

if TYPE_CHECKING:
    from phimlx.models.config import ModelConfig
    from phimlx.models.names import Renames

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Dialect:
    """Another layout of an architecture's checkpoints: other settings, other tensor names.

    Attributes:
        model_type: that its config.json names.
        read_config: "module:function" that writes a config in the architecture's own terms, given
            that of the dialect and the `adapter_config.json` of each adapter folder.
        renames: "module:function" that makes the table of names, given the config in our terms;
            the architecture's own where None.
        adapter_folders: folders that hold adapters in files of their own, by the adapter's name.
        is_shared: whether models of other families are published in it, so that the type alone
            does not tell one of ours.
    """

    model_type: str
    read_config: str
    renames: str | None = None
    adapter_folders: Mapping[str, str] = field(default_factory=dict)
    is_shared: bool = False

    def own_config(self, config: Config, adapters: Mapping[str, Config]) -> dict[str, Any]:
        """Write a config of this dialect in the architecture's own terms."""
        read: Callable[..., dict[str, Any]] = _load(self.read_config)
        return read(config, adapters)


@dataclass(frozen=True)
class SensitiveLayers:
    """Layers that a mixed recipe gives more bits, as a pattern of paths.

    Attributes:
        ends: only in this part of the decoder layers from the first on, and up to the last;
            None for all of them.
    """

    pattern: str
    ends: float | None = None


@dataclass(frozen=True)
class GGUF:
    """Names of an architecture in llama.cpp's format, in which it is written and read.

    Attributes:
        architecture: under which llama.cpp knows it.
        tensors: our path, without a decoder layer's prefix -> what stands between `blk.N.`, or
            nothing, and `.weight`.
        norm: "rms" or "layer", which names the setting that holds the norms' epsilon.
        sliding_window: whether there is a setting for it.
        joined: name of a tensor that files may hold as one or as several -> names of these, in
            the order of their rows.
        paired_rows: names of queries and keys whose rows stand in pairs that turn together, head
            by head, where ours stand in halves.
        text_split: how the tokenizer splits text, in llama.cpp's words, where older files do not
            say it.
    """

    architecture: str
    tensors: Mapping[str, str]
    norm: str = "rms"
    sliding_window: bool = False
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    paired_rows: tuple[str, ...] = ()
    text_split: str | None = None


@dataclass(frozen=True)
class Width:
    """Units of a decoder layer that can be left out, as many in each: channels, groups of heads.

    Attributes:
        unit: what a person calls several of them.
        sizes: keys of the config that shrink in proportion, the number of units first.
        rows: projections whose rows the units share evenly, in each piece of a fused one.
        columns: the projection whose columns they share evenly, and which reads what they give.
        multiple: of which their number stays one.
        stated: keys that the config must then state, since they no longer follow from others.
    """

    unit: str
    sizes: tuple[str, ...]
    rows: tuple[str, ...]
    columns: str
    multiple: int = 1
    stated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sharding:
    """How several machines share a decoder layer: each has some of the heads and mlp channels.

    Attributes:
        rows: projections of which each keeps rows, of every piece of a fused one as many.
        columns: those of which each keeps columns; what comes of them is summed over all.
        counts: attributes of a layer, by path, that count its heads.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[str, ...] = ()


# What modelling code computes, and older versions of it save: tables of the rotary embedding, a
# list of positions, causal masks.
BUFFERS = ("*.rotary_emb.*", "*.position_ids", "*.causal_mask", "*.masked_bias")


@dataclass(frozen=True)
class Architecture:
    """The record of one architecture: all that the rest of phimlx needs to know of it.

    Attributes:
        model_type: as in config.json.
        model, config: "module:class" of the model and of its checked config.
        projections: paths of a decoder layer's projections, in the order in which it calls them:
            where adapters may sit, and what is calibrated. Not every layer need have all.
        fused_projections: the last name of a projection that holds several of other
            architectures -> the names of these, in the order of their rows.
        split_config: "module:function" that writes a config in the terms of a layout that stores
            the pieces of fused projections apart; None where there is no such layout.
        widths: what can be left out of every layer, by the name of the option that says how much.
        unused: patterns of stored tensors that the architecture does without, of whatever type.
        takes: what goes in: "text", "image", "audio".
        adapters: whether the checkpoint itself holds adapters that its inputs call for.
        parts: what stands beside the language model, "adapters" and "encoders" -> what the paths
            of its tensors hold, one of these each.
        projectors: by what prompts hold, "image", "audio" or "image+audio", the paths of what turns
            features into rows of the language model.
        placeholder_texts: what stands for media in a rendered prompt, by kind, where it is no token
            of the tokenizer.
        after_media: text between media and what follows them in a message.
        image_processor: "module:function" that makes, given the preprocessor_config.json, what
            prepares images for the model; None where it takes none.
        image_memory: "module:function" that estimates what its largest image takes; see
            `largest_image`.
        sound_memory: the same of its longest sound; see `longest_sound`.
        sensitive_layers: what mixed recipes give more bits; empty for no such recipes.
        task: of a model card.
        gguf: how it is written for llama.cpp, and read; None where llama.cpp does not run it.
        gguf_dialects: other forms of such files that are read.
        peers: other programs that run it by code of their own.
        onnx: the name of its class by which onnxruntime-genai's builder knows it; None where that
            makes no whole model of it.
        dialects: other layouts that are read.
        sharding: how machines share its layers; None where each has to hold them whole.
    """

    model_type: str
    model: str
    config: str
    projections: tuple[str, ...]
    fused_projections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    split_config: str | None = None
    widths: Mapping[str, Width] = field(default_factory=dict)
    unused: tuple[str, ...] = BUFFERS
    takes: tuple[str, ...] = ("text",)
    adapters: bool = False
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    projectors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    placeholder_texts: Mapping[str, str] = field(default_factory=dict)
    after_media: str = ""
    image_processor: str | None = None
    image_memory: str | None = None
    sound_memory: str | None = None
    sensitive_layers: tuple[SensitiveLayers, ...] = ()
    task: str = "text-generation"
    gguf: GGUF | None = None
    gguf_dialects: tuple[GGUF, ...] = ()
    peers: tuple[str, ...] = ()
    onnx: str | None = None
    dialects: tuple[Dialect, ...] = ()
    sharding: Sharding | None = None

    @property
    def takes_media(self) -> bool:
        """Whether anything but text goes in."""
        return self.takes != ("text",)

    def is_projector(self, name: str, held: Collection[str] | None = None) -> bool:
        """Whether a parameter is a part of what turns features into rows of the language model.

        Args:
            held: what prompts hold; anything where None.
        """
        paths = [
            path
            for kind, paths in self.projectors.items()
            for path in paths
            if held is None or kind in held
        ]
        return any(name.startswith(f"{path}.") for path in paths)

    def names(self, dialect: Dialect | None, config: Config) -> Renames:
        """Make the table of tensor names of a layout.

        Its own may have split projections.

        Args:
            config: in the architecture's own terms.
        """
        if dialect is not None and dialect.renames is not None:
            make: Callable[[Config], Renames] = _load(dialect.renames)
            return make(config)
        from phimlx.models.names import Renames, split_projections

        return Renames(split_projections(self.projections, self.fused_projections))

    def pieces(self, path: str, rows: Sequence[int]) -> dict[str, int]:
        """Give the paths of the pieces of a fused projection, in order, and the rows of each."""
        from phimlx.models.names import piece_paths

        return dict(zip(piece_paths(path, self.fused_projections), rows, strict=True))

    def in_split_layout(self, config: Config) -> dict[str, Any]:
        """Write a config for a layout with split projections.

        Raises:
            ConfigError: where that cannot tell what this config says.
        """
        assert self.split_config is not None
        write: Callable[[Config], dict[str, Any]] = _load(self.split_config)
        return write(config)

    def read_config(self, config: Config) -> ModelConfig:
        """Check a config in the architecture's own terms.

        Raises:
            ConfigError: naming the key, where a value is missing, unknown or contradicts another.
        """
        return _load(self.config).from_dict(config)

    def prepare_images(self, settings: Config) -> Callable[..., Any]:
        """Make what prepares images, called with their sources and limits.

        Args:
            settings: from preprocessor_config.json, empty where there is none.

        Raises:
            ConfigError: naming the key, where a value cannot be.
        """
        assert self.image_processor is not None
        made: Callable[..., Any] = _load(self.image_processor)(settings)
        return made

    def largest_image(
        self, shape: Any, itemsize: int, tokens: int | None = None
    ) -> dict[str, int] | None:
        """Estimate what encoding the largest image takes; None for a model that takes none.

        Args:
            shape: the model's config, or what the catalogue knows of it.
            itemsize: bytes of a number in the computation.
            tokens: of the largest that there is; as many as one may have where None.

        Returns:
            How many "crops" or "patches" it has, and "working", the bytes.
        """
        if self.image_memory is None:
            return None
        estimate: Callable[..., dict[str, int]] = _load(self.image_memory)
        return estimate(shape, itemsize, tokens)

    def longest_sound(self, shape: Any, itemsize: int, tokens: int) -> int:
        """Estimate the bytes that encoding a sound takes.

        Args:
            shape: the model's config.
            itemsize: bytes of a number in the computation.
            tokens: of the longest that there is.
        """
        assert self.sound_memory is not None
        estimate: Callable[..., int] = _load(self.sound_memory)
        return estimate(shape, itemsize, tokens)

    def model_class(self) -> Any:
        """Import the model's class, which makes an empty model from what `read_config` gives."""
        return _load(self.model)


_PHI3_PROJECTIONS = (
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
_PHI3_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _widths(
    channels: tuple[tuple[str, ...], str], heads: tuple[tuple[str, ...], str]
) -> dict[str, Width]:
    """Describe an MLP's channels and the groups of heads that share keys, by rows and columns."""
    return {
        "mlp": Width("mlp channels", ("intermediate_size",), *channels, multiple=64),
        "heads": Width(
            "key/value heads",
            ("num_key_value_heads", "num_attention_heads"),
            *heads,
            stated=("head_dim",),
        ),
    }


_PHI3_WIDTHS = _widths(
    (("mlp.gate_up_proj",), "mlp.down_proj"), (("self_attn.qkv_proj",), "self_attn.o_proj")
)

_PHI3_SHARDING = Sharding(
    rows=("self_attn.qkv_proj", "mlp.gate_up_proj"),
    columns=("self_attn.o_proj", "mlp.down_proj"),
    counts=("self_attn.heads", "self_attn.kv_heads"),
)

# Where an error costs most: the embedding and the output head, which in a tied model are one and
# which every logit passes; the attention's input, where the values that a query picks go through;
# the first block, on which all others build; and in the first and last eighth of the blocks the
# two layers that write to the residual stream (these ends and the attention follow llama.cpp's
# Q4_K_M, src/llama-quant.cpp).
_PHI3_SENSITIVE = (
    SensitiveLayers("model.embed_tokens"),
    SensitiveLayers("lm_head"),
    SensitiveLayers("*.qkv_proj"),
    SensitiveLayers("model.layers.0.*"),
    SensitiveLayers("*.down_proj", ends=0.125),
    SensitiveLayers("*.o_proj", ends=0.125),
)

_QKV = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}

_PHI3_GGUF = GGUF(
    "phi3",
    {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    sliding_window=True,
    joined=_QKV,
)

# phi-4 as Unsloth publishes it, in Llama's layout. Source: llama.cpp, convert_hf_to_gguf.py,
# LlamaModel.permute.
_LLAMA_GGUF = GGUF(
    "llama",
    {**_PHI3_GGUF.tensors, "mlp.gate_up_proj": "ffn_gate_up"},
    joined={**_QKV, "ffn_gate_up": ("ffn_gate", "ffn_up")},
    paired_rows=("attn_q", "attn_k"),
)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_type="phi3",
        model="phimlx.models.phi3:Phi3ForCausalLM",
        config="phimlx.models.phi3:Phi3Config",
        projections=_PHI3_PROJECTIONS,
        fused_projections=_PHI3_FUSED,
        split_config="phimlx.models.llama:split_config",
        widths=_PHI3_WIDTHS,
        sensitive_layers=_PHI3_SENSITIVE,
        gguf=_PHI3_GGUF,
        gguf_dialects=(_LLAMA_GGUF,),
        peers=("mlx-lm", "transformers"),
        onnx="Phi3ForCausalLM",
        sharding=_PHI3_SHARDING,
        dialects=(
            Dialect(
                model_type="llama",
                read_config="phimlx.models.llama:llama_config",
                is_shared=True,
            ),
            Dialect(
                model_type="mistral",
                read_config="phimlx.models.llama:mistral_config",
                is_shared=True,
            ),
        ),
    ),
    Architecture(
        model_type="phi",
        model="phimlx.models.phi:PhiForCausalLM",
        config="phimlx.models.phi:PhiConfig",
        projections=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.dense",
            "mlp.fc1",
            "mlp.fc2",
        ),
        widths=_widths(
            (("mlp.fc1",), "mlp.fc2"),
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"),
        ),
        sensitive_layers=(
            SensitiveLayers("model.embed_tokens"),
            SensitiveLayers("lm_head"),
            SensitiveLayers("*.q_proj"),
            SensitiveLayers("*.k_proj"),
            SensitiveLayers("*.v_proj"),
            SensitiveLayers("model.layers.0.*"),
            SensitiveLayers("*.fc2", ends=0.125),
            SensitiveLayers("*.dense", ends=0.125),
        ),
        gguf=GGUF(
            "phi2",
            {
                "model.embed_tokens": "token_embd",
                "model.final_layernorm": "output_norm",
                "lm_head": "output",
                "input_layernorm": "attn_norm",
                "self_attn.q_proj": "attn_q",
                "self_attn.k_proj": "attn_k",
                "self_attn.v_proj": "attn_v",
                "self_attn.dense": "attn_output",
                "mlp.fc1": "ffn_up",
                "mlp.fc2": "ffn_down",
            },
            norm="layer",
            joined=_QKV,
            text_split="gpt-2",
        ),
        peers=("mlx-lm", "transformers"),
        onnx="PhiForCausalLM",
        sharding=Sharding(
            rows=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            columns=("self_attn.dense", "mlp.fc2"),
        ),
        dialects=(
            Dialect(
                model_type="phi-msft",
                read_config="phimlx.models.phi:older_config",
                renames="phimlx.models.phi:msft_renames",
            ),
            Dialect(
                model_type="mixformer-sequential",
                read_config="phimlx.models.phi:older_config",
                renames="phimlx.models.phi:mixformer_renames",
            ),
        ),
    ),
    Architecture(
        model_type="phi4flash",
        model="phimlx.models.phi4flash.model:Phi4FlashForCausalLM",
        config="phimlx.models.phi4flash.config:Phi4FlashConfig",
        projections=(
            "attn.Wqkv",
            "attn.in_proj",
            "attn.x_proj",
            "attn.dt_proj",
            "attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        ),
        sensitive_layers=(
            SensitiveLayers("model.embed_tokens"),
            SensitiveLayers("*.Wqkv"),
            SensitiveLayers("*.in_proj"),
            SensitiveLayers("model.layers.0.*"),
            SensitiveLayers("*.fc2", ends=0.125),
            SensitiveLayers("*.out_proj", ends=0.125),
        ),
    ),
    Architecture(
        model_type="phi4mm",
        model="phimlx.models.phi4mm.model:Phi4MMForCausalLM",
        config="phimlx.models.phi4mm.model:Phi4MMConfig",
        projections=_PHI3_PROJECTIONS,
        fused_projections=_PHI3_FUSED,
        takes=("text", "image", "audio"),
        adapters=True,
        parts={"adapters": (".lora_",), "encoders": ("model.embed_tokens_extend.",)},
        projectors={
            "image": ("model.embed_tokens_extend.image_embed.img_projection",),
            "audio": ("model.embed_tokens_extend.audio_embed.audio_projection.speech",),
            "image+audio": ("model.embed_tokens_extend.audio_embed.audio_projection.vision",),
        },
        image_processor="phimlx.media.image:image_processor",
        image_memory="phimlx.models.phi4mm.config:image_memory",
        sound_memory="phimlx.models.phi4mm.config:sound_memory",
        sensitive_layers=_PHI3_SENSITIVE,
        task="image-text-to-text",
        sharding=_PHI3_SHARDING,
        dialects=(
            Dialect(
                model_type="phi4_multimodal",
                read_config="phimlx.models.phi4mm.names:published_config",
                renames="phimlx.models.phi4mm.names:native_renames",
                adapter_folders={"vision": "vision-lora", "speech": "speech-lora"},
            ),
        ),
    ),
    Architecture(
        model_type="phi4-siglip",
        model="phimlx.models.phi4siglip.model:Phi4SiglipForCausalLM",
        config="phimlx.models.phi4siglip.config:Phi4SiglipConfig",
        projections=_PHI3_PROJECTIONS,
        fused_projections=_PHI3_FUSED,
        widths=_PHI3_WIDTHS,
        takes=("text", "image"),
        parts={"encoders": ("model.vision_tower.", "model.mm_projector.")},
        placeholder_texts={"image": "<image>"},
        after_media="\n",
        image_processor="phimlx.media.naflex:image_processor",
        image_memory="phimlx.models.phi4siglip.config:image_memory",
        sensitive_layers=_PHI3_SENSITIVE,
        task="image-text-to-text",
        sharding=_PHI3_SHARDING,
    ),
)

_BY_TYPE = {
    model_type: architecture
    for architecture in ARCHITECTURES
    for model_type in (
        architecture.model_type,
        *(dialect.model_type for dialect in architecture.dialects),
    )
}


def find(model_type: object) -> Architecture | None:
    """Find the architecture that a `model_type` means, in its own layout or a dialect's."""
    return _BY_TYPE.get(model_type) if isinstance(model_type, str) else None


def of_config(config: Config) -> Architecture:
    """Find the architecture of a config.json.

    Raises:
        ConfigError: where phimlx does not run it.
    """
    architecture = find(config.get("model_type"))
    if architecture is None:
        sibling = catalog.sibling_of_type(config.get("model_type"))
        if sibling is not None:
            raise ConfigError(*sibling.refusal())
        known = ", ".join(each.model_type for each in ARCHITECTURES)
        raise ConfigError(
            f"config.json: model_type is {shortened(config.get('model_type'))}, but phimlx runs "
            f"the Phi family: {known}."
        )
    return architecture


def of_gguf(name: object) -> tuple[Architecture, GGUF] | None:
    """Find the architecture that llama.cpp knows by a name, and its names in such files."""
    forms = (
        (architecture, form)
        for architecture in ARCHITECTURES
        for form in (architecture.gguf, *architecture.gguf_dialects)
        if form is not None
    )
    return next((found for found in forms if found[1].architecture == name), None)


def dialect_of(config: Config) -> Dialect | None:
    """Find the dialect that a config.json is written in; None for the architecture's own."""
    dialects = (dialect for each in ARCHITECTURES for dialect in each.dialects)
    return next((d for d in dialects if d.model_type == config.get("model_type")), None)


def part_of(path: str) -> str | None:
    """Find the part beside a language model that a tensor or layer is in; None for its own."""
    marks = (item for architecture in ARCHITECTURES for item in architecture.parts.items())
    return next((part for part, own in marks if any(mark in path for mark in own)), None)


def adapter_folders() -> Iterator[str]:
    """List the folders beside a model's own files that hold adapters it cannot do without."""
    for architecture in ARCHITECTURES:
        for dialect in architecture.dialects:
            yield from dialect.adapter_folders.values()


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
