"""A model folder -> a folder for ONNX Runtime, by the builder that comes with onnxruntime-genai.

The builder reads the Hub's layout, which is written first, by way of transformers and torch. It
runs as a process of its own, so that neither is ever imported here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.folder import check_space, new_folder
from convert.plan import ConversionPlan, ConversionResult, plan_folder
from convert.read import WeightFiles
from convert.request import ONNX_TYPES, ConversionRequest
from phimlx.checkpoint.folder import Checkpoint
from phimlx.errors import ConversionError, clipped
from phimlx.extras import require_extra
from phimlx.files import read_json, write_json
from phimlx.models import registry
from phimlx.models.base import ModelConfig

NEEDED = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers")
BUILDER = "onnxruntime_genai.models.builder"
CHANNELS = 16  # in multiples of so many ONNX Runtime turns queries and keys
KEPT = ("LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md")
CARD = """# {name}

{source} for ONNX Runtime, in {type}, made by phimlx with the model builder of onnxruntime-genai
{version}. It runs wherever onnxruntime-genai does:

```python
import onnxruntime_genai as og

model = og.Model("{name}")
```
"""


@dataclass(frozen=True)
class OnnxPlan:
    """A folder for ONNX Runtime, checked, not yet begun; see `convert.plan.ConversionPlan`.

    Attributes:
        hub: of the model in the Hub's layout, which the builder reads.
        builds: the name of the model's class, by which the builder knows it.
        type: of the weights, in the builder's words.
    """

    hub: ConversionPlan
    config: ModelConfig
    builds: str
    type: str
    calibration: None = None

    @property
    def bytes_before(self) -> int:
        return self.hub.bytes_before

    def run(self, advance: Callable[[int], object] = lambda nbytes: None) -> ConversionResult:
        """Write the folder, which appears when it is complete.

        Raises:
            ConversionError: where a weight is not finite, the builder fails or the folder cannot
                be written. Nothing is left behind then.
        """
        start = time.perf_counter()
        out, shards = self.hub.request.out_path, self.hub.layout.shards
        decisive = (self.hub.digest, self.type, version("onnxruntime-genai"))
        digest = hashlib.sha256(repr(decisive).encode()).hexdigest()
        with new_folder(out, digest, shards, self.hub.files.keep_after) as journal:
            continued = self.hub.fill(journal, advance)
            journal.record(len(self.hub.tensors.conversions))
            folder = journal.folder
            self._describe(folder / "config.json")
            self._build(folder, folder / "onnx")
            for file in folder.iterdir():
                if file.is_file() and file.name not in KEPT and not file.name.startswith("."):
                    file.unlink()
            for file in (folder / "onnx").iterdir():
                file.rename(folder / file.name)
            (folder / "onnx").rmdir()
            self._write_card(folder / "README.md")
            nbytes = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
        result = self.hub.result(continued, time.perf_counter() - start)
        return replace(
            result,
            bytes_after=nbytes,
            bits_per_weight=8 * nbytes / result.parameters,
            dtype=self.type,
            remarks=(*result.remarks, *self._remarks),
        )

    @property
    def _remarks(self) -> tuple[str, ...]:
        step = self.config.rope.original_max_position_embeddings
        if not self.config.rope.long_factor:
            return ()
        return (
            f"ONNX Runtime keeps the keys of a prompt of up to {step} tokens as they are where the "
            "reply grows past that, and may answer otherwise than phimlx from there on.",
        )

    def _describe(self, file: Path) -> None:
        """Complete config.json by what the builder wants to be said."""
        rope, config = self.config.rope, read_json(file)
        original = rope.original_max_position_embeddings or self.config.max_position_embeddings
        said: dict[str, Any] = {"architectures": [self.builds]}
        write_json(file, {**config, "original_max_position_embeddings": original, **said})

    def _build(self, folder: Path, out: Path) -> None:
        """Run the builder.

        Raises:
            ConversionError: where it fails, with what it says last.
        """
        command = [
            *(sys.executable, "-P", "-m", BUILDER, "-i", str(folder), "-o", str(out)),
            *("-p", self.type, "-e", "cpu", "-c", str(folder / ".cache")),
        ]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **offline},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        if done.returncode or not (out / "genai_config.json").is_file():
            said = [line for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
            raise ConversionError(
                f"onnxruntime-genai's builder made no model of {self.hub.checkpoint.folder}; it "
                f"says: {clipped(said[-1].strip())}",
                hint="Try another version: pip install --upgrade onnxruntime-genai",
            )

    def _write_card(self, file: Path) -> None:
        card = CARD.format(
            name=self.hub.request.out_path.name,
            source=self.hub.source.folder.resolve().name,
            type=self.type,
            version=version("onnxruntime-genai"),
        )
        card += "".join(f"\n{remark}\n" for remark in self._remarks)
        file.write_text(card, encoding="utf-8", errors="replace")


def plan_onnx(request: ConversionRequest, files: WeightFiles) -> OnnxPlan:
    """Plan a folder for ONNX Runtime; see `convert.api.plan_conversion`.

    Raises:
        ConversionError: where the builder is not installed or makes no right model of this one, and
            as `plan_conversion` does.
    """
    without = "ONNX models are made by onnxruntime-genai's builder, which is not installed."
    require_extra(NEEDED, "onnx", without, ConversionError)
    hub = plan_folder(replace(request, layout="hf"), files)
    checkpoint = hub.checkpoint
    architecture = registry.of_config(checkpoint.config)
    config = architecture.read_config(checkpoint.config)
    if architecture.onnx is None:
        raise ConversionError(
            f"{checkpoint.folder} is a {architecture.model_type} model, which onnxruntime-genai's "
            "builder does not make whole: there is no ONNX export of such a model.",
            hint="Write another layout: --export hf, or MLX's without --export.",
        )
    reason = _obstacle(checkpoint, config)
    if reason is not None:
        raise ConversionError(
            f"{checkpoint.folder} {reason}", hint="Write another layout: --export hf or gguf."
        )
    if "tokenizer.json" not in hub.source.companions:
        raise ConversionError(
            f"{checkpoint.folder} has no tokenizer.json, which a model for ONNX Runtime holds.",
            hint="Name a folder that has it with --tokenizer.",
        )
    check_space(
        request.out_path, hub.layout.nbytes + 4 * sum(t.size for t in hub.tensors.conversions)
    )
    return OnnxPlan(hub, config, architecture.onnx, ONNX_TYPES[request.layout])


def _obstacle(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """Tell what of a model ONNX Runtime would compute otherwise or not at all; None for nothing."""
    rope = config.rope
    if rope.scaling is not None:
        return f"has {rope.scaling.kind} scaling, which onnxruntime-genai's builder leaves out."
    if rope.dims % CHANNELS:
        return (
            f"turns {rope.dims} channels of each head, and ONNX Runtime turns them in multiples of "
            f"{CHANNELS}."
        )
    if getattr(config, "qk_layernorm", False):
        return "norms queries and keys, which onnxruntime-genai's builder leaves out."
    widths = [rows for _, rows in config.projection_shapes.values()]
    if config.vocab_size in widths:
        return (
            f"has a projection of {config.vocab_size} rows, as many as tokens, which "
            "onnxruntime-genai's builder would take for the output head."
        )
    return None
