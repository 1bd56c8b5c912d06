"""A reply on its way to the screen: plain as it comes, and what is said about it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phimlx.sizes import size_text
from phimlx.terminal.output import Output, encode_json

if TYPE_CHECKING:
    from phimlx.generation.reply import Reply
    from phimlx.terminal.interrupt import Interruptible


def print_reply(answer: Interruptible, output: Output) -> Reply:
    """Print a reply as it comes, unadorned, and return it.

    Text goes to stdout, and after it each tool call as one line of JSON; reasoning goes dimmed
    to stderr where that is a terminal.
    """
    write: Callable[[str], None] = output.write
    kind, last = "text", ""
    for piece in answer:
        if not piece.text:
            continue
        if last and piece.kind != kind:
            write("\n\n")
        kind, last = piece.kind, piece.text
        write = output.aside if kind == "reasoning" else output.write
        write(last)
    if last and not last.endswith("\n"):
        write("\n")
    reply = answer.stream.reply
    for call in reply.tool_calls:
        output.text(encode_json(call.as_object()))
    return reply


def reply_stats(reply: Reply) -> dict[str, Any]:
    """Make the object of JSON that the history keeps of what a reply took."""
    made = reply.as_object("")
    return {**made["stats"], "finish_reason": made["finish_reason"], "seed": made["seed"]}


def reply_summary(reply: Reply) -> str:
    """Sum up in one line what a reply took: tokens, tokens a second, memory."""
    stats = reply.stats
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    cut = ", cut there" if reply.finish_reason == "length" else ""
    drafted = f", {stats.tokens_per_pass:.2f} a pass" if stats.drafted_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens{cached}, {stats.prefill_rate:.1f}/s · "
        f"{stats.generated_tokens} tokens{cut}, {stats.generate_rate:.1f}/s{drafted} · "
        f"peak {size_text(stats.peak_memory)}"
    )
