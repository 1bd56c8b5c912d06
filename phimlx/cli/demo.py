"""`phimlx demo`: convert, ask and compare, offline, on the models that come along.

Shows what `convert`, `phimlx.api` and `phimlx.evaluation.bundled` do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.api import Phi
    from phimlx.evaluation.bundled import Question, Scene
    from phimlx.generation.reply import Reply


SAMPLE = 3  # questions of each kind that are compared


@click.command()
@click.option("--all", "ask_all", is_flag=True, help="Compare on all held-out questions.")
@json_option
def command(ask_all: bool, as_json: bool) -> None:
    """See everything at work on the small models that come along.

    Converts phi-4-nano to 4 bits in a temporary folder, asks it one question of each kind, and
    compares 4 bits with bfloat16 on questions that it never saw: some of each kind, or with --all
    every one, which takes minutes on a CPU. Shows phi-4-nano-multimodal pictures and sounds. Needs
    no network.
    """
    from convert import Quantization, convert
    from phimlx import api
    from phimlx.evaluation import bundled as demo
    from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    every = demo.questions()
    asked = every if ask_all else demo.sample(every, SAMPLE)
    with tempfile.TemporaryDirectory(prefix="phimlx-demo-") as store:
        small = Path(store) / "nano-4bit"
        made = convert(NANO, small, Quantization(bits=4, group_size=64))
        forms = {
            "bfloat16": (api.load(NANO), 16.0, made.bytes_before),
            "4 bits": (api.load(small), made.bits_per_weight, made.bytes_after),
        }
    step = forms["4 bits"][0].model.config.rope.original_max_position_embeddings
    output.text(
        f"phi-4-nano has Phi-4-mini's architecture at {made.parameters / 1e6:.1f} million "
        "parameters. It is a demonstration and knows almost nothing."
    )
    output.text(
        f"Converted to 4 bits: {size_text(made.bytes_before)} -> {size_text(made.bytes_after)} in "
        f"{made.seconds:.1f} s. Questions that it never saw:\n"
    )
    shown = []
    for question in _one_of_each(every):
        reply = demo.ask(forms["4 bits"][0], question)
        _show(output, question, reply, step)
        shown.append(_as_object(question, reply, demo.is_right(reply, question)))
    rows = []
    compared = {}
    with output.progress(len(forms) * len(asked), "Comparing", " questions") as bar:
        for name, (phi, bits, nbytes) in forms.items():
            counts = demo.count_right(phi, asked, lambda: bar.update(1))
            right = sum(n for kind, (n, _) in counts.items() if kind != "long")
            row = (name, f"{bits:.2f}", size_text(nbytes), f"{right} of {len(asked)}")
            rows.append((*row, f"{right / len(asked):.1%}"))
            compared[name] = {
                "bits_per_weight": bits,
                "bytes": nbytes,
                "right": right,
                "asked": len(asked),
                "kinds": {kind: {"right": n, "asked": of} for kind, (n, of) in counts.items()},
            }
    output.text(
        f"All {len(every)} held-out questions:"
        if ask_all
        else f"{len(asked)} of the {len(every)} held-out questions (phimlx demo --all asks all):"
    )
    output.table(["weights", "bits per weight", "size", "right", "share"], rows)
    output.text("\nphi-4-nano-multimodal has eyes and ears. Pictures and sounds new to it:\n")
    seen = _look_and_listen(api.load(NANO_MULTIMODAL), output)
    output.text("Try it yourself: phimlx chat --model nano")
    output.json(
        {"parameters": made.parameters, "answers": shown, "forms": compared, "scenes": seen}
    )


def _look_and_listen(phi: Phi, output: Output) -> list[dict[str, Any]]:
    """One picture of each kind of question, one sound, and one of both together."""
    from phimlx.evaluation import bundled as demo

    chosen: dict[tuple[str, str], Scene] = {
        (scene.modality, scene.kind if scene.modality == "vision" else ""): scene
        for scene in demo.scenes(phi.path)
    }
    seen = []
    for scene in chosen.values():
        reply = demo.look_and_listen(phi, scene)
        files = [str(path.relative_to(phi.path)) for path in (scene.image, scene.audio) if path]
        asked = scene.question or (f"“{scene.said}”" if scene.said else "What is said?")
        output.text(f"  {asked}  ({', '.join(files)})")
        right = reply.text.strip() == scene.answer
        remark = "" if right else f"  (wrong: it is {scene.answer})"
        output.text(f"  -> {reply.text.strip()}{remark}\n", "bold")
        seen.append(
            {
                "modality": scene.modality,
                "kind": scene.kind,
                "files": files,
                "question": scene.question or scene.said,
                "answer": reply.text.strip(),
                "expected": scene.answer,
                "right": right,
            }
        )
    return seen


def _one_of_each(asked: Sequence[Question]) -> list[Question]:
    """The first short question of each kind, then the first one longer than the step."""
    chosen: dict[str, Question] = {}
    for question in asked:
        if not question.long:
            chosen.setdefault(question.kind, question)
    return [*chosen.values(), *[question for question in asked if question.long][:1]]


def _show(output: Output, question: Question, reply: Reply, step: int) -> None:
    stats = reply.stats
    turns = [message for message in question.messages if message["role"] == "user"]
    kind = question.kind
    if question.long:
        kind += f", {stats.prompt_tokens} tokens: past the LongRoPE step at {step}"
    elif len(turns) > 1:
        kind += f", turn {len(turns)}"
    output.text(f"  {question.messages[-1]['content']}  ({kind})")
    calls = [f"{call.name}({_arguments(call.arguments)})" for call in reply.tool_calls]
    answer = " ".join([part for part in (reply.text.strip(), *calls) if part])
    output.text(f"  -> {answer}", "bold")
    output.text(
        f"     {stats.generated_tokens} tokens at {stats.generate_rate:.0f} a second\n", "dim"
    )


def _arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _as_object(question: Question, reply: Reply, right: bool) -> dict[str, Any]:
    return {
        "kind": question.kind,
        "long": question.long,
        "question": question.messages[-1]["content"],
        "answer": reply.text.strip(),
        "tool_calls": [vars(call) for call in reply.tool_calls],
        "expected": question.answer,
        "right": right,
        "prompt_tokens": reply.stats.prompt_tokens,
        "tokens_per_second": reply.stats.generate_rate,
    }
