"""Options that several commands share, each declared once, and loading the model they name."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phimlx.cli.preferences import preferences
from phimlx.cli.together import machines
from phimlx.errors import shortened
from phimlx.machine.kv_bits import KV_BITS
from phimlx.media.limits import Limits
from phimlx.preferences.sampling import SETTINGS, FiniteRange, Setting
from phimlx.prompt.media_parts import FRAMES
from phimlx.terminal.output import Output
from phimlx.tools import MAX_ROUNDS

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.generation.answerer import Answerer
    from phimlx.generation.prefix_store import PrefixStore

MULTIMODAL = "phi-4-multimodal"
"""The default model where pictures or sounds are given."""

DEBUG = "phimlx.debug"
"""Set in the context's `meta` by --debug."""

AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])

model_option = click.option(
    "--model",
    metavar="MODEL",
    help="An alias, a Hub id or a folder  [default: phi-4-mini at 4 bits]",
)


def model_argument(command: AnyCallable) -> AnyCallable:
    """Let MODEL be given by position too; below `model_option`, whose keyword it fills."""

    @wraps(command)
    def taken(*, words: tuple[str, ...], model: str | None, **values: Any) -> Any:
        given = [*([] if model is None else [model]), *words]
        if model is not None and words:
            raise click.UsageError("The model is given twice: with --model and as MODEL.")
        if len(given) > 1:
            name = shlex.quote(given[0])
            raise click.UsageError(
                f"One MODEL is taken, but {len(given)} words are given. To ask one question: "
                f"phimlx generate --model {name} PROMPT"
            )
        return command(model=given[0] if given else None, **values)

    argument: Any = click.argument("words", metavar="[MODEL]", nargs=-1)
    return argument(taken)  # type: ignore[no-any-return]


ADAPTER = "What was fine-tuned: a folder or a Hub id of an adapter of phimlx, mlx-lm or PEFT."
adapter_option = click.option("--adapter-path", "adapter", metavar="ADAPTER", help=ADAPTER)
adapters_option = click.option(
    "--adapter-path",
    "adapters",
    metavar="[NAME=]ADAPTER",
    multiple=True,
    help=f"{ADAPTER} With a NAME, for the lines of --prompts that name it; may be given again.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="What to compute in  [default: as stored]",
)


class RopeScaling(click.ParamType[dict[str, Any]]):
    """A scaling of the rotary embedding: KIND:FACTOR, or an object as in a config."""

    name = "rope scaling"

    def convert(self, value: Any, param: Any, ctx: Any) -> dict[str, Any]:
        from phimlx.models.rope_scaling import read_argument

        try:
            return read_argument(value)
        except (ValueError, RecursionError):
            self.fail(f"{shortened(value)} is neither KIND:FACTOR, such as yarn:4, nor JSON.")


rope_scaling_option = click.option(
    "--rope-scaling",
    metavar="KIND:FACTOR",
    type=RopeScaling(),
    help="Reach further than the model was trained: yarn:4, linear:4 or dynamic:4, or an object as "
    "in config.json. For models without LongRoPE; no longer the published model.",
)
kv_bits_option = click.option(
    "--kv-bits",
    type=click.Choice(KV_BITS),
    help="Hold keys and values in 8 or 4 bits, for longer contexts  [default: not quantized]",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object."
)
system_option = click.option(
    "--system", "--system-prompt", "system", metavar="TEXT", help="What the model is told first."
)
tools_option = click.option(
    "--tools",
    "tools_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Functions that the model may call: a JSON list of their definitions.",
)
mcp_option = click.option(
    "--mcp",
    metavar="CONFIG|COMMAND|URL",
    multiple=True,
    help="Let the model call the tools of MCP servers: a JSON file as Claude Desktop has it, a "
    "command line, or an address. May be given again.",
)
config_option = click.option(
    "--config",
    "-c",
    "config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Settings from a YAML or TOML file, under these names; flags come before it.",
)
resume_option = click.option("--resume", is_flag=True, help="Go on with the run in --adapter-path.")
yes_option = click.option(
    "--yes", "-y", "allow_all", is_flag=True, help="Run every tool that is called, without asking."
)
max_rounds_option = click.option(
    "--max-rounds",
    metavar="N",
    type=click.IntRange(min=1),
    default=MAX_ROUNDS,
    show_default=True,
    help="Replies in a row that may call tools; the next one answers.",
)


def batch_size_option(text: str) -> Callable[[AnyCallable], AnyCallable]:
    """Add --batch-size; `text` says what of."""
    return click.option(
        "--batch-size",
        metavar="N",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help=text,
    )


prompt_form_option = click.option(
    "--prompt-form",
    metavar="NAME",
    help="A published form to write the prompt in, other than the model's own: phi-2, phi-2-chat …",
)

prompt_lookup_option = click.option(
    "--prompt-lookup/--no-prompt-lookup",
    default=None,
    help="Draft tokens from what prompt and reply hold: the same reply, sooner  [default: yes]",
)
cache_option = click.option(
    "--cache/--no-cache",
    "keeps",
    default=None,
    help="Keep the prompt on disk, and read from there what was kept of it  [default: of prompts "
    "over 1,024 tokens]",
)

# Field of `Limits`: what it accepts, its metavar, its help.
LIMITS: dict[str, tuple[click.ParamType[Any], str, str]] = {
    "max_pixels": (click.IntRange(min=1), "N", "Most pixels of a picture or a video's frame."),
    "max_aspect": (FiniteRange(min=1), "X", "Longer side of a picture over its shorter, at most."),
    "max_seconds": (FiniteRange(min=0, min_open=True), "S", "Length of a sound or video, at most."),
    "max_frames": (click.IntRange(min=1), "N", "Most pictures that a video becomes."),
    "max_bytes": (click.IntRange(min=1), "N", "Most bytes of a file."),
    "max_download": (click.IntRange(min=1), "N", "Most bytes of a file from a URL."),
}
MEDIA = {
    "image": "Show a picture to the model; may be given again.",
    "audio": "Play a sound to the model; may be given again.",
    "video": "Show some pictures of a video; may be given again. On Linux, needs phimlx[video].",
}


frames_option = click.option(
    "--frames",
    metavar="N",
    type=click.IntRange(min=1),
    default=FRAMES,
    show_default=True,
    help="Pictures that a video becomes.",
)


def media_options(command: AnyCallable) -> AnyCallable:
    """Add --image, --audio and --video, each as a tuple of paths and URLs."""
    for name, text in reversed(MEDIA.items()):
        option = click.option(f"--{name}", metavar="PATH|URL", multiple=True, help=text)
        command = option(command)
    return command


def limit_options(
    *names: str, usual: Mapping[str, str] | None = None
) -> Callable[[AnyCallable], AnyCallable]:
    """Add the flags that raise limits on media, all of them where none is named.

    Args:
        usual: what to call a default that is not that of `Limits`.
    """

    def add(command: AnyCallable) -> AnyCallable:
        for name in reversed(names or tuple(LIMITS)):
            kind, metavar, text = LIMITS[name]
            default = (usual or {}).get(name) or f"{getattr(Limits(), name):,.0f}"
            text += f"  [default: {default}]"
            flag = f"--{name.replace('_', '-')}"
            command = click.option(flag, name, metavar=metavar, type=kind, help=text)(command)
        return command

    return add


def check_files(sources: Iterable[str]) -> None:
    """Raise `MediaError` for a path that leads nowhere, before a model is loaded for nothing."""
    from phimlx.errors import MediaError
    from phimlx.files import reason
    from phimlx.media.limits import source_name
    from phimlx.media.source import is_url

    for source in sources:
        if is_url(source):
            continue
        try:
            os.stat(source)
        except (FileNotFoundError, ValueError):  # a NUL names nothing
            name = source_name(source)
            raise MediaError(f"There is no file {name}.", hint="Check the path.") from None
        except OSError as error:
            why = reason(error)
            raise MediaError(f"{source_name(source)} cannot be read: {why}.") from error


def pop_limits(values: dict[str, Any], **usual: Any) -> Limits:
    """Take the limits out of a command's keywords."""
    found = {name: values.pop(name, None) for name in LIMITS}
    return Limits(**usual | {name: value for name, value in found.items() if value is not None})


def _option(setting: Setting) -> Callable[[AnyCallable], AnyCallable]:
    names = [setting.flag, *([setting.short] if setting.short else []), setting.keyword]
    return click.option(
        *names,
        type=setting.type,
        metavar=setting.metavar,
        multiple=setting.multiple,
        help=setting.help,
    )


def sampling_options(command: AnyCallable) -> AnyCallable:
    """Add the flags of `phimlx.preferences.sampling`; the command takes them as keywords.

    A setting that was not given arrives as None, or () where it may be given again:
    `phimlx.preferences.sampling.given` leaves those out.
    """
    for setting in reversed(SETTINGS):
        command = _option(setting)(command)
    return command


def is_debugging() -> bool:
    """Tell whether the run was asked for tracebacks."""
    return DEBUG in click.get_current_context().meta


def prefix_store(phi: Answerer, keeps: bool | None, output: Output) -> PrefixStore | None:
    """Open the store of long prompts as `--cache` says; None where nothing is kept."""
    if keeps is False:
        return None
    return phi.prefix_store(output.note, **({"min_tokens": 1} if keeps else {}))


def split_adapters(given: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Tell the adapter of all requests from those that requests name, of `--adapter-path`.

    A folder that is there is a folder, whatever its name. Raises `click.UsageError` where two are
    for the same requests.
    """
    usual: list[str] = []
    named: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or "/" in name or os.path.exists(text):
            usual.append(text)
        elif name in named:
            raise click.UsageError(f"--adapter-path is given twice for {shortened(name)}.")
        else:
            named[name] = source
    if len(usual) > 1:
        raise click.UsageError(
            "--adapter-path is given twice. With --prompts give each a name: NAME=ADAPTER."
        )
    return usual[0] if usual else None, named


def own_adapter(model: str | None) -> str | None:
    """Return the adapter that goes with a name of the user's own; None where there is none."""
    found: str | None = preferences().alias.get(model or "", {}).get("adapter")
    return found


def load_or_download(
    model: str | None,
    output: Output,
    adapter: str | None = None,
    adapters: Mapping[str, str] | None = None,
    *,
    dtype: str | None = None,
    rope_scaling: dict[str, Any] | None = None,
    always_ask: bool = False,
) -> Phi:
    """Load the model that `--model` names, or an alias of the user's own.

    Where it was not given: the user's default, else the catalogue's.

    Args:
        adapter: a folder or a Hub id, from --adapter-path.
        adapters: more of them by name, which requests choose.
        dtype: to compute in; as stored where None.
        rope_scaling: from --rope-scaling; the config's own where None.
        always_ask: before any download, where a file rather than the user named the model.

    Where it is not here and somebody sits at the terminal, it is downloaded, above 1 GB after
    asking. Elsewhere that is an error, which names the command.
    """
    from phimlx import api
    from phimlx.errors import ModelAbsentError
    from phimlx.hub.resolve import resolve_adapter

    choice = preferences().choose(model)
    adapter = adapter or own_adapter(choice.name)
    model, adapters = choice.model, adapters or {}
    shared = machines()
    for source in (*([] if adapter is None else [adapter]), *adapters.values()):
        try:
            resolve_adapter(source)
        except ModelAbsentError as absent:
            from phimlx.cli.bars import download_missing

            download_missing(source, output, absent, adapter=True)
    more: dict[str, Any] = {} if rope_scaling is None else {"rope_scaling": rope_scaling}
    more |= {} if shared is None else {"machines": shared}
    loading = f"Loading {model or 'the model'}…"
    try:
        with output.status(loading):
            phi = api.load(model, adapter, dtype, **more)
    except ModelAbsentError as absent:
        from phimlx.cli.bars import download_missing

        download_missing(model, output, absent, always_ask)
        with output.status(loading):
            phi = api.load(model, adapter, dtype, **more)
    for remark in phi.remarks:
        output.warning(remark)
    for name, source in adapters.items():
        for remark in phi.load_adapter(source, name):
            output.warning(f"{name}: {remark}")
    return phi
