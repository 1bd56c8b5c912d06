"""A model folder -> one GGUF file, as llama.cpp reads it, one block of rows at a time.

An architecture's names in that format are in its record; the format itself is the `gguf` package's.
Source: llama.cpp, convert_hf_to_gguf.py, Phi3MiniModel and Phi2Model.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx

import phimlx
from convert.folder import Journal, check_space, new_file, refuse_existing, stamps
from convert.plan import BATCHES_AHEAD, JOURNAL_BYTES, ConversionResult, check_purpose
from convert.read import WeightFiles, read_blocks
from convert.request import GGUF_TYPES, ConversionRequest
from convert.tensor_plan import TensorConversion, TensorPlan
from phimlx import catalog
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.gguf.find import find_gguf
from phimlx.checkpoint.gguf.names import gguf_name
from phimlx.errors import ConversionError, shortened, some
from phimlx.extras import import_extra
from phimlx.files import read_json
from phimlx.hub import model_files
from phimlx.hub.layout import model_name
from phimlx.models import registry
from phimlx.models.base import ModelConfig
from phimlx.models.registry import GGUF
from phimlx.prompt.tokenizer.gguf import GPT2, SPLITS

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from numpy.typing import NDArray

BLOCK_BYTES = 4 << 20  # packing them takes several times as much


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file, checked and laid out, not yet begun; see `convert.plan.ConversionPlan`."""

    checkpoint: Checkpoint
    config: ModelConfig
    out: Path
    tensors: TensorPlan
    kind: str
    files: WeightFiles
    calibration: None = None

    @property
    def bytes_before(self) -> int:
        return self.tensors.bytes_before

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the bytes of the file."""
        described = [self.checkpoint.folder / "config.json"]
        described += model_files.companions(self.checkpoint.folder).values()
        versions = [phimlx.__version__, *map(version, ("mlx", "gguf")), str(mx.default_device())]
        decisive = (versions, stamps([*described, *self.checkpoint.files]), self.tensors, self.kind)
        return hashlib.sha256(repr(decisive).encode()).hexdigest()

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> ConversionResult:
        """Write the file, which appears when it is complete.

        Raises:
            ConversionError: where a weight is not finite, or the file cannot be written. Nothing is
                left behind then.
        """
        start = time.perf_counter()
        with new_file(self.out, self.digest, self.files.keep_after) as journal:
            continued = sum(tensor.nbytes for tensor in self.tensors.conversions[: journal.done])
            if continued:
                advance(continued)
            header = self._header(journal.folder)
            descriptor = os.open(journal.folder / self.out.name, os.O_RDWR | os.O_CREAT, 0o644)
            with os.fdopen(descriptor, "r+b") as file:
                file.write(header)
                weights = self._write_weights(file, journal, advance)
        size = sum(tensor.size for tensor in self.tensors.conversions)
        return ConversionResult(
            path=self.out,
            source=self.checkpoint.folder,
            parameters=size,
            bits_per_weight=8 * weights / size,
            bytes_before=self.bytes_before,
            bytes_after=weights,
            tensors=len(self.tensors.conversions),
            dtype=self.kind,
            recipe=None,
            quantization=None,
            undivided=(),
            continued=continued,
            seconds=time.perf_counter() - start,
        )

    def _header(self, folder: Path) -> bytes:
        """All that comes before the weights, written by way of a file that is gone then."""
        import gguf
        import numpy as np

        path = folder / "header"
        form = self._form
        writer = gguf.GGUFWriter(path, form.architecture)
        _add_settings(writer, self.checkpoint, self.config, form, self.kind)
        _add_tokenizer(writer, self.checkpoint.folder, self.config.vocab_size)
        for name, factors in self._rope_factors.items():
            writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
        dtype = np.dtype(np.float32)  # of a shape that counts numbers, not bytes
        for tensor in self.tensors.conversions:
            name, nbytes = gguf_name(tensor.transform.name, form), self._nbytes(tensor)
            writer.add_tensor_info(name, tensor.shape, dtype, nbytes, self._kind_of(tensor))
        writer.open_output_file()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
        path.unlink()
        return header + bytes(-len(header) % gguf.GGUF_DEFAULT_ALIGNMENT)

    def _write_weights(
        self, file: BinaryIO, journal: Journal, advance: Callable[[int], object]
    ) -> int:
        """Write the weights after the header, those that the journal has not; their bytes."""
        import gguf
        import numpy as np

        start = file.tell()

        def pad() -> None:
            file.write(bytes((start - file.tell()) % gguf.GGUF_DEFAULT_ALIGNMENT))

        for factors in self._rope_factors.values():
            file.write(factors.tobytes())
            pad()
        for tensor in self.tensors.conversions[: journal.done]:
            file.seek(self._nbytes(tensor), os.SEEK_CUR)
            file.seek((start - file.tell()) % gguf.GGUF_DEFAULT_ALIGNMENT, os.SEEK_CUR)
        file.truncate()
        work = [
            (number, tensor, rows)
            for number, tensor in enumerate(self.tensors.conversions)
            if number >= journal.done
            for rows in tensor.blocks(BLOCK_BYTES)
        ]
        blocks = read_blocks([rows for _, _, rows in work], BATCHES_AHEAD, self.files)
        unrecorded = 0
        for (number, tensor, rows), stored in zip(work, blocks, strict=True):
            block = tensor.transform.apply(stored)
            mx.eval(block.parts, block.source_finite, block.result_finite)
            block.check()
            numbers = np.array(block.parts[tensor.transform.name].astype(mx.float32))
            file.write(gguf.quants.quantize(numbers, self._kind_of(tensor)).tobytes())
            unrecorded += rows.nbytes
            if rows.is_last:
                pad()
                if unrecorded >= JOURNAL_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    journal.record(number + 1)
                    unrecorded = 0
            advance(rows.nbytes)
            del block, stored
            mx.clear_cache()
        return file.tell() - start

    @property
    def _form(self) -> GGUF:
        form = registry.of_config(self.checkpoint.config).gguf
        assert form is not None  # as `plan_gguf` has checked
        return form

    @property
    def _rope_factors(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        rope = self.config.rope
        both = (("long", rope.long_factor), ("short", rope.short_factor))
        return {
            f"rope_factors_{name}.weight": np.array(factors, np.float32)
            for name, factors in both
            if factors
        }

    def _nbytes(self, tensor: TensorConversion) -> int:
        from gguf import GGML_QUANT_SIZES

        block, block_bytes = GGML_QUANT_SIZES[self._kind_of(tensor)]
        return tensor.size // block * block_bytes

    def _kind_of(self, tensor: TensorConversion) -> GGMLQuantizationType:
        """As llama.cpp's converter: norms in full, rows that no block divides in half precision."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if len(tensor.shape) == 1:
            return GGMLQuantizationType.F32
        kind = GGMLQuantizationType[self.kind]
        divides = tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
        return kind if divides else GGMLQuantizationType.F16


def plan_gguf(request: ConversionRequest, files: WeightFiles) -> GgufPlan:
    """Plan a GGUF file; see `convert.api.plan_conversion`.

    Raises:
        ConversionError: where the model is a multimodal one, has no tokenizer that llama.cpp knows,
            or the `gguf` package is not installed, and as `plan_conversion` does.
    """
    without = "GGUF files are written by the gguf package, which is not installed."
    import_extra("gguf", "gguf", without, ConversionError)
    out, kind = request.out_path, GGUF_TYPES[request.layout]
    refuse_existing(out)
    file = find_gguf(Path(request.source))
    if file is not None:
        raise ConversionError(
            f"{file} is a GGUF file already.",
            hint="Convert it to a folder first, and then that folder to GGUF.",
        )
    checkpoint = Checkpoint(request.source)
    architecture = registry.of_config(checkpoint.config)
    if architecture.gguf is None:
        what = (
            "sees and hears, with an adapter for each"
            if architecture.adapters
            else f"is a {architecture.model_type} model"
        )
        raise ConversionError(
            f"{checkpoint.folder} {what}, which llama.cpp does not run: there is no GGUF file of "
            "such a model.",
            hint="Write another layout: --export hf, or MLX's without --export.",
        )
    config = architecture.read_config(checkpoint.config)
    if config.rope.scaling is not None:
        raise ConversionError(
            f"{checkpoint.folder} has {config.rope.scaling.kind} scaling in its config.json, which "
            "llama.cpp computes otherwise.",
            hint="Take rope_scaling out of config.json, and give llama.cpp --rope-scaling itself.",
        )
    check_purpose(checkpoint, None, request.dequantize)
    tensors = TensorPlan.of(checkpoint, None, None)
    _check_names(checkpoint, architecture.gguf, tensors)
    half = {"F16": mx.float16}.get(kind, mx.float32)
    typed = tuple(
        replace(
            tensor,
            transform=replace(
                tensor.transform, dtype=mx.float32 if len(tensor.shape) == 1 else half
            ),
        )
        for tensor in tensors.conversions
    )
    planned = GgufPlan(checkpoint, config, out, replace(tensors, conversions=typed), kind, files)
    model_files.companions(checkpoint.folder)  # which refuses links that lead elsewhere
    read_vocabulary(checkpoint.folder, config.vocab_size)
    check_space(out, 2 * sum(tensor.size for tensor in typed) + files.spare(tensors.file_order))
    return planned


def _check_names(checkpoint: Checkpoint, form: GGUF, tensors: TensorPlan) -> None:
    """Raise ConversionError for tensors that llama.cpp's architecture has not."""
    nameless = []
    for tensor in tensors.conversions:
        try:
            gguf_name(tensor.transform.name, form)
        except KeyError:
            nameless.append(tensor.transform.name)
    if nameless:
        raise ConversionError(
            f"{checkpoint.folder} has tensors that llama.cpp's {form.architecture} models have "
            f"not: {some(nameless)}.",
            hint="Write another layout: --export hf, or MLX's without --export.",
        )


def read_vocabulary(folder: Path, size: int) -> tuple[list[str], list[int], str]:
    """Read tokens by id, their types in GGUF's numbers, and the name of how text is split.

    Raises:
        ConversionError: where there is no tokenizer, or one that llama.cpp would not know.
    """
    from gguf import TokenType

    if not (folder / "tokenizer.json").is_file():
        raise ConversionError(f"{folder} has no tokenizer.json, which a GGUF file holds.")
    table = read_json(folder / "tokenizer.json")
    try:
        splitter = _splitter(table["pre_tokenizer"])
        tokens = [f"[PAD{i}]" for i in range(size)]
        types = [int(TokenType.UNUSED)] * size
        known = [
            (token, number, TokenType.NORMAL) for token, number in table["model"]["vocab"].items()
        ]
        for added in table["added_tokens"]:
            token = added["content"]
            control = added["special"] or (token.startswith("<|") and token.endswith("|>"))
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            known.append((token, added["id"], kind))
        for token, number, kind in known:
            if not 0 <= number < size:
                raise IndexError(f"{token} has the id {number}")
            tokens[number], types[number] = token, int(kind)
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise ConversionError(
            f"tokenizer.json is not one that llama.cpp would read as it is meant "
            f"({type(error).__name__} {shortened(str(error))})."
        ) from error
    return tokens, types, splitter


def _splitter(pre_tokenizer: dict[str, Any]) -> str:
    """Give llama.cpp's name of how a tokenizer splits text."""
    if pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer.get("use_regex", True):
        return GPT2
    pattern = pre_tokenizer["pretokenizers"][0]["pattern"]["Regex"]
    return next(name for name, known in SPLITS.items() if pattern == known)


def _add_settings(
    writer: GGUFWriter, checkpoint: Checkpoint, config: ModelConfig, form: GGUF, kind: str
) -> None:
    import gguf

    known = catalog.by_config(checkpoint.config, model_name(checkpoint.folder.resolve()))
    if known is not None:
        writer.add_name(known.alias)
        writer.add_license(known.licence.lower())
    rope = config.rope
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    add_epsilon = {"rms": writer.add_layer_norm_rms_eps, "layer": writer.add_layer_norm_eps}
    add_epsilon[form.norm](config.norm_eps)
    writer.add_rope_dimension_count(rope.dims)
    writer.add_rope_freq_base(rope.theta)
    if rope.long_factor:
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    if form.sliding_window:
        writer.add_sliding_window(config.sliding_window or 0)  # 0 tells Phi-4 from Phi-3
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind}"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    import gguf

    tokens, types, splitter = read_vocabulary(folder, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special: Any = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_to_gguf(writer, quiet=True)
