"""`phimlx show`: what a model is, how large, and whether this machine can hold it."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option, kv_bits_option
from phimlx.cli.preferences import preferences
from phimlx.machine.kv_bits import KV_BITS, check_kv_bits, kv_group_size
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.catalog import Model
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.errors import ModelAbsentError
    from phimlx.machine.memory import Shape

BITS = (16, 8, 6, 5, 4, 3)
SHORT_CONTEXT = 4096  # shown beside the longest where --context names none


@click.command()
@click.argument("model", metavar="MODEL", required=False)
@click.option(
    "--context",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Length of prompt and reply together to count memory for.",
)
@kv_bits_option
@json_option
def command(model: str | None, context: int | None, kv_bits: int | None, as_json: bool) -> None:
    """Say what MODEL is and how much memory it takes; phi-4-mini at 4 bits where none is named.

    MODEL is an alias, a Hub id, a folder or a GGUF file. Of a model that is not on this machine it
    says what the catalogue knows, else what its headers on the Hub say, and how many bits suit
    here.
    """
    from phimlx import catalog
    from phimlx.errors import ModelAbsentError
    from phimlx.hub.resolve import find_local_gguf, resolve
    from phimlx.machine.device import emulates_bfloat16

    shape: Shape
    output = Output(json=as_json)
    model = preferences().choose(model).model
    try:
        file = None if model is None else find_local_gguf(model)
        about, shape = describe_folder(resolve(model)) if file is None else describe_gguf(file)
    except ModelAbsentError as absent:
        known = catalog.DEFAULT if model is None else catalog.find(model)
        if known is not None:
            about, shape = describe_absent(known, model or known.alias), known
        else:
            about, shape = describe_remote(str(model), absent)
    for remark in about.pop("remarks", ()):
        output.warning(remark)
    if "packed_by" in about:
        where = shlex.quote(about["path"] or about["repository"])
        output.warning(
            f"{about['packed_by']} packed these weights, which phimlx converts but does not run: "
            f"phimlx convert {where} --mlx-path OUT -q"
        )
    longest = about["context_length"]
    if context is not None and context > longest:
        raise click.BadParameter(
            f"{about['name']} holds {longest:,} tokens.", param_hint="--context"
        )
    contexts = sorted({min(SHORT_CONTEXT, longest), longest}) if context is None else [context]
    about |= memory(shape, about, contexts, kv_bits)
    about["float16_pays"] = "BF16" in about["dtype"] and emulates_bfloat16()
    about |= image_memory(shape, about)
    if about["path"] is None:
        about |= quantizations(shape, about, contexts[0], kv_bits)
    output.json(about)
    print_description(about, output)


def describe_folder(folder: Path) -> tuple[dict[str, Any], Shape]:
    """Describe a model on this machine; its shape goes with it."""
    from phimlx.checkpoint.folder import Checkpoint

    return describe(Checkpoint(folder))


def describe_gguf(file: Path) -> tuple[dict[str, Any], Shape]:
    """Describe the model in a GGUF file, as it is once converted; its shape goes with it."""
    from phimlx.checkpoint.gguf.file import GgufCheckpoint

    checkpoint = GgufCheckpoint(file)
    about, shape = describe(checkpoint)
    return {**about, "packed": "/".join(checkpoint.packed_types)}, shape


def describe(checkpoint: Checkpoint) -> tuple[dict[str, Any], Shape]:
    """Describe a model that has been read as far as its headers; its shape goes with it."""
    from mlx.utils import tree_flatten

    from phimlx import catalog
    from phimlx.checkpoint.load import build_model, stored_parameters
    from phimlx.checkpoint.tensors import FLOATING_DTYPES
    from phimlx.generation.generation_config import GenerationConfig
    from phimlx.generation.sampler import Sampling
    from phimlx.hub.layout import model_name
    from phimlx.models.registry import part_of

    folder = checkpoint.folder
    model = build_model(checkpoint.config)
    sizes = Counter[str | None]()
    for name, array in dict(tree_flatten(model.parameters())).items():
        sizes[part_of(name)] += array.size
    parameters = sizes.total()
    stored = stored_parameters(checkpoint, model).values()
    read = {rows for tensor in stored for rows in tensor.reads(0, tensor.count)}
    nbytes = sum(rows.nbytes for rows in read)
    known = catalog.by_config(checkpoint.config, model_name(folder.resolve()))
    settings = GenerationConfig.read(folder)
    scaling = model.config.rope.scaling
    sampling = asdict(Sampling.defaults(settings.values, known.sampling if known else {}))
    usual = asdict(Sampling())
    quantization, foreign = checkpoint.quantization, checkpoint.foreign
    packed = foreign and {"bits": foreign.bits, "group_size": foreign.group_size}
    form = quantization or packed or {"bits": None, "group_size": None}
    return {
        "name": known.alias if known else folder.resolve().name,
        "path": str(folder),
        "download": None,
        "repository": known.repo if known else None,
        "architecture": checkpoint.config["model_type"],
        "parameters": parameters,
        "whole_parameters": parameters - sizes[None],
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / parameters,
        "dtype": "/".join(sorted({i.dtype for i in stored if i.dtype in FLOATING_DTYPES})),
        "bits": form["bits"],
        "group_size": form["group_size"],
        **({} if foreign is None else {"packed_by": foreign.framework}),
        "file_bytes": sum(file.stat().st_size for file in checkpoint.files),
        "context_length": model.config.max_position_embeddings,
        "longrope_step": model.config.rope.original_max_position_embeddings or None,
        "rope_scaling": scaling and {"kind": scaling.kind, **asdict(scaling)},
        "vocabulary": model.config.vocab_size,
        "tied": model.config.tie_word_embeddings,
        "licence": known.licence if known else None,
        "sampling": {key: value for key, value in sampling.items() if value != usual[key]},
        "remarks": list(settings.remarks),
    }, model.config


def describe_absent(known: Model, name: str) -> dict[str, Any]:
    """Describe a model that is not on this machine, in the form that `name` means."""
    from phimlx.hub.resolve import repositories

    repository = repositories(name)[0]
    quantized = repository == known.quantized_repo
    nbytes = known.quantized_nbytes if quantized else known.nbytes
    return {
        "name": known.alias,
        "path": None,
        "download": f"phimlx download {name}",
        "repository": repository,
        "architecture": known.architecture,
        "parameters": known.parameters,
        "whole_parameters": known.whole_parameters,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / known.parameters,
        "dtype": "BF16",
        "bits": 4 if quantized else None,
        "group_size": 64 if quantized else None,
        "file_bytes": None,
        "context_length": known.context_length,
        "longrope_step": known.longrope_step,
        "rope_scaling": None,
        "vocabulary": known.vocab_size,
        "tied": known.tied,
        "licence": known.licence,
        "sampling": dict(known.sampling),
    }


def describe_remote(repo: str, absent: ModelAbsentError) -> tuple[dict[str, Any], Shape]:
    """Describe a model of the Hub from its headers; raises `absent` where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    from phimlx.hub.preview import preview

    if constants.HF_HUB_OFFLINE:
        raise absent
    with preview(repo) as (folder, repository):
        about, shape = describe_folder(folder)
    about |= {
        "path": None,
        "download": f"phimlx download {repo}" if "packed_by" not in about else None,
        "repository": repository.current_name,
    }
    return about, shape


def quantizations(
    shape: Shape, about: dict[str, Any], context: int, kv_bits: int | None = None
) -> dict[str, Any]:
    """List what each quantization takes and holds here, and the one that suits best.

    That is the one with most bits, up to 8, that leaves half of the memory free at `context`
    tokens, else 4 bits, else 3; none for a quantized model whose original is not known.
    """
    from phimlx import catalog
    from phimlx.machine.memory import footprint, longest_context, machine_memory

    here = machine_memory()
    known = catalog.find(about["repository"])
    if about["bits"] and known is None:
        return {"quantizations": [], "recommended": None}
    rows = []
    for bits in BITS:
        # 16 bits stay as they are; else groups of 64 share a scale and a bias of 16 bits each.
        whole = about["whole_parameters"]
        packed = about["parameters"] - whole
        nbytes = int(packed * (bits + (0.5 if bits < 16 else 0)) / 8) + 2 * whole
        rows.append(
            {
                "bits": bits,
                "bytes": nbytes,
                "total": footprint(shape, nbytes, context, kv_bits=kv_bits).total,
                "longest_context_here": min(
                    about["context_length"],
                    longest_context(shape, nbytes, here, kv_bits=kv_bits),
                ),
            }
        )
    fitting = [row["bits"] for row in rows if row["longest_context_here"] >= context]
    roomy = [row["bits"] for row in rows if 4 < row["bits"] < 16 and row["total"] * 2 <= here]
    best = max(roomy, default=next((bits for bits in (4, 3) if bits in fitting), None))
    return {"quantizations": rows, "recommended": best and recommendation(about, known, best)}


def recommendation(about: dict[str, Any], known: Model | None, bits: int) -> dict[str, Any]:
    """Name a number of bits and the command that gets them."""
    repo = known.repo if known is not None else about["repository"]
    if known is not None and known.quantized_repo is not None and bits == 4:
        command = f"phimlx download {known.alias}"
    else:
        command = f"phimlx convert {repo} --mlx-path {about['name']}-{bits}bit -q --q-bits {bits}"
    return {"bits": bits, "command": command}


def memory(
    shape: Shape, about: dict[str, Any], contexts: list[int], kv_bits: int | None
) -> dict[str, Any]:
    """Count the bytes needed at each context, and what is here, as entries of the description.

    Where the longest does not fit, and keys and values are not quantized, how far the model fits
    with each `--kv-bits` is among them.
    """
    from phimlx.machine.memory import footprint, longest_context, machine_memory

    check_kv_bits(kv_bits, shape.head_dim)
    here = machine_memory()
    weights, itemsize = about["bytes"], 4 if "F32" in about["dtype"] else 2
    needed = [footprint(shape, weights, context, itemsize, kv_bits) for context in contexts]
    longest = {
        bits: min(about["context_length"], longest_context(shape, weights, here, itemsize, bits))
        for bits in (kv_bits, *KV_BITS)
    }
    tight = longest[kv_bits] < contexts[-1] and kv_bits is None
    suggested = KV_BITS if tight and kv_group_size(shape.head_dim) is not None else ()
    return {
        "memory": [
            {**asdict(each), "total": each.total, "fits": each.total <= here} for each in needed
        ],
        "machine_memory": here,
        "longest_context_here": longest[kv_bits],
        "kv_bits": kv_bits,
        "with_kv_bits": [
            {"kv_bits": bits, "longest_context_here": longest[bits]} for bits in suggested
        ],
    }


def image_memory(shape: Shape, about: dict[str, Any]) -> dict[str, Any]:
    """Count what the largest picture takes of a model that sees, as entries of the description."""
    from phimlx.models import registry

    architecture = registry.find(about["architecture"])
    itemsize = 4 if "F32" in about["dtype"] else 2
    picture = architecture and architecture.largest_image(shape, itemsize)
    return {"picture": picture} if picture else {}


def print_description(about: dict[str, Any], output: Output) -> None:
    """Print the description for a person."""
    from phimlx.sizes import size_text

    form = about.get("packed") or about["dtype"]
    if about["bits"]:
        groups = f" in groups of {about['group_size']}" if about["group_size"] else ""
        form = f"{about['bits']} bits{groups}, the rest {form}"
    context = f"{about['context_length']:,} tokens"
    if about["longrope_step"]:
        context += f", LongRoPE's long factors beyond {about['longrope_step']:,}"
    scaling = about["rope_scaling"]
    if scaling:
        context += (
            f", by {scaling['kind']} scaling of {scaling['original']:,} by {scaling['factor']:g}: "
            "not the published model"
        )
    sampling = ", ".join(f"{key} {value}" for key, value in about["sampling"].items())
    whole = about["whole_parameters"]
    parameters = f"{about['parameters']:,}"
    if whole:
        parameters += f", of which {whole:,} in encoders and adapters"
    lines = {
        "file" if "packed" in about else "folder": about["path"] or "not on this machine",
        "repository": about["repository"],
        "architecture": about["architecture"],
        "parameters": parameters,
        "weights": f"{size_text(about['bytes'])}, {about['bits_per_weight']:.2f} bits per weight "
        f"({form})",
        "context": context,
        "vocabulary": f"{about['vocabulary']:,}, "
        + ("tied to the output head" if about["tied"] else "with an output head of its own"),
        "licence": about["licence"],
        "sampling": sampling or "the likeliest token",
    }
    output.text(about["name"], "bold")
    for key, value in lines.items():
        if value:
            output.text(f"  {key:<13} {value}")
    output.text()
    parts = ("weights", "cache", "working", "total")
    rows = [
        (
            f"{row['context']:,}",
            *(size_text(row[part]) for part in parts),
            "yes" if row["fits"] else "no",
        )
        for row in about["memory"]
    ]
    output.table(["tokens", "weights", "cache", "working (about)", "memory", "fits"], rows)
    output.text()
    here = size_text(about["machine_memory"])
    output.text(
        f"It {context_that_fits(about['longest_context_here'], about['context_length'], here)}."
    )
    advice = kv_bits_advice(about)
    if advice is not None:
        output.text(advice)
    if about["float16_pays"]:
        output.text("This chip emulates bfloat16: with --dtype float16 it reads prompts quicker.")
    if "picture" in about:
        (unit, count), (_, working) = about["picture"].items()
        output.text(
            f"A picture of {count:,} {unit}, the largest, takes about {size_text(working)} more "
            "while it is seen."
        )
    if about.get("quantizations"):
        output.text()
        print_quantizations(about, output)
    if about["download"] and not output.as_json:
        output.note(f"Get it with: {about['download']}")
    if "packed" in about and not output.as_json:
        output.note(f"Convert it with: phimlx convert {about['path']} --mlx-path OUT -q")


def kv_bits_advice(about: dict[str, Any]) -> str | None:
    """Say which --kv-bits make a context fit that does not otherwise, or reach furthest."""
    wanted = about["memory"][-1]["context"]
    choices = about["with_kv_bits"]
    enough = [each for each in choices if each["longest_context_here"] >= wanted]
    best = max(enough or choices[-1:], key=lambda each: int(each["kv_bits"]), default=None)
    if best is None or best["longest_context_here"] <= about["longest_context_here"]:
        return None
    fits = context_that_fits(best["longest_context_here"], about["context_length"])
    return f"With --kv-bits {best['kv_bits']} it {fits}."


def print_quantizations(about: dict[str, Any], output: Output) -> None:
    """Print the quantizations for a person."""
    from phimlx.sizes import size_text

    rows = [
        (
            row["bits"],
            size_text(row["bytes"]),
            context_that_fits(row["longest_context_here"], about["context_length"]),
        )
        for row in about["quantizations"]
    ]
    output.table(["bits", "weights", "on this machine"], rows)
    best = about["recommended"]
    output.text()
    if best is None:
        output.text("No quantization of it suits this machine.")
    else:
        output.text(f"Best here: {best['bits']} bits, with: {best['command']}")


def context_that_fits(longest: int, context_length: int, where: str = "") -> str:
    """Say in a clause how far a model fits; `where` names the memory."""
    place = f" this machine's {where}" if where else ""
    if longest >= context_length:
        return f"fits{place} at every length"
    if longest > 0:
        rounded = longest // 1000 * 1000 or longest
        return f"fits{place} up to about {rounded:,} tokens"
    return f"does not fit{place}"
