"""`phimlx generate`: one prompt, one answer, streamed as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.conversations import (
    LAST,
    open_keeper,
    private_option,
    read_kept,
)
from phimlx.cli.furnish import Flags, furnish, persona_option
from phimlx.cli.options import (
    MULTIMODAL,
    adapters_option,
    batch_size_option,
    cache_option,
    check_files,
    dtype_option,
    frames_option,
    json_option,
    kv_bits_option,
    limit_options,
    load_or_download,
    media_options,
    model_option,
    pop_limits,
    prefix_store,
    prompt_form_option,
    prompt_lookup_option,
    rope_scaling_option,
    sampling_options,
    split_adapters,
    system_option,
    tools_option,
)
from phimlx.cli.remote import pop_servers, server_options
from phimlx.cli.shapes import pop_shape, shape_options, tool_choice_option
from phimlx.cli.spread import SpreadFiles
from phimlx.cli.stdin import read_files, read_prompt
from phimlx.cli.together import together
from phimlx.preferences.sampling import given
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.generation.answerer import Answerer


@click.command(cls=SpreadFiles)
@click.argument("words", metavar="[PROMPT]", required=False)
@model_option
@adapters_option
@dtype_option
@rope_scaling_option
@kv_bits_option
@click.option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from stdin.")
@media_options
@frames_option
@persona_option
@system_option
@tools_option
@tool_choice_option
@shape_options
@prompt_form_option
@click.option(
    "--raw",
    "--ignore-chat-template",
    "raw",
    is_flag=True,
    help="Give the prompt to the model as it is: no chat template, control tokens recognised.",
)
@click.option(
    "--continue",
    "continued",
    is_flag=True,
    help="Go on with the last conversation of the history, with its model and settings.",
)
@private_option
@sampling_options
@click.option(
    "--top-logprobs",
    metavar="N",
    type=click.IntRange(0, 20),
    help="Add to the JSON each token's log-probability, and so many of the likeliest, up to 20.",
)
@prompt_lookup_option
@cache_option
@server_options
@click.option(
    "--prompts",
    "prompts_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Answer every line of a JSONL file; needs --output.",
)
@click.option(
    "--output",
    "-o",
    "output_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the replies to --prompts to this file, one a line.",
)
@batch_size_option("Lines of --prompts that are answered together.")
@limit_options()
@json_option
@click.option("--verbose", "-v", is_flag=True, help="Print token counts and speed to stderr.")
@together
def command(
    words: str | None,
    model: str | None,
    adapters: tuple[str, ...],
    dtype: str | None,
    rope_scaling: dict[str, Any] | None,
    kv_bits: int | None,
    prompt: str | None,
    image: tuple[str, ...],
    audio: tuple[str, ...],
    video: tuple[str, ...],
    frames: int,
    persona: str | None,
    system: str | None,
    tools_file: Path | None,
    tool_choice: str | None,
    prompt_form: str | None,
    raw: bool,
    continued: bool,
    private: bool,
    top_logprobs: int | None,
    prompts_file: Path | None,
    output_file: Path | None,
    batch_size: int,
    keeps: bool | None,
    as_json: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Answer one prompt: PROMPT, --prompt TEXT, or what is piped in.

    What is piped in beside PROMPT goes before it, or where - stands:

    \b
      phimlx generate "Summarise this." < notes.txt
      phimlx generate --prompt "Summarise this:" - < notes.txt

    Pictures and sounds go before the prompt, pictures first, to phi-4-multimodal where no other
    model is named. With --audio there need be no prompt: the question may be spoken. Several may
    follow one flag, and - is what is piped in.

    \b
      phimlx generate --image chart.png --prompt "What does it show?"
      phimlx generate --image before.png after.png "What has changed?"

    stdout gets the answer, and tool calls as one JSON object a line. Reasoning and statistics
    go to stderr, where it is a terminal. Control characters are removed from what the model
    says; --json keeps them, escaped.

    With --schema the answer is JSON that is valid under it, and --json prints it as "parsed" too.

    \b
      phimlx generate --image receipt.jpg --schema "shop, total float, items [str]"

    With --prompts every line of a file is answered, several at a time: a text, or an object with
    prompt or messages and options of its own, such as max_tokens or the name of an adapter. After
    an interruption the same command goes on where it was.

    \b
      phimlx generate --prompts questions.jsonl --output answers.jsonl
    """
    if (prompts_file is None) != (output_file is None):
        raise click.UsageError("--prompts and --output belong together.")
    if raw and any(each is not None for each in (system, tools_file, prompt_form, persona)):
        raise click.UsageError(
            "--raw uses no chat template, so it takes no --system, --tools, --prompt-form or "
            "--persona."
        )
    in_file = prompts_file is not None
    if tool_choice is not None and tools_file is None and not (in_file or continued):
        raise click.UsageError("--tool-choice needs --tools.")
    shape, servers = pop_shape(settings), pop_servers(settings)
    if in_file and (words or prompt or image or audio or video):
        raise click.UsageError("With --prompts the file says what is asked, and nothing else does.")
    if top_logprobs is not None and not (as_json or in_file):
        raise click.UsageError("--top-logprobs goes with --json or --prompts.")
    adapter, by_name = split_adapters(adapters)
    if by_name and not in_file:
        raise click.UsageError(
            "--adapter-path NAME=ADAPTER belongs to --prompts, whose lines give the name."
        )
    spoken = bool(audio) and prompt is None and words is None and not raw
    files, taken = read_files({"image": image, "video": video, "audio": audio})
    text = "" if spoken or in_file else read_prompt(prompt, words, raw, taken)
    if continued and (raw or in_file):
        raise click.UsageError("--continue goes with neither --raw nor --prompts.")
    if continued and taken:
        raise click.UsageError("--continue keeps files by their path, which stdin (-) has none of.")

    from phimlx.terminal.conversation import Conversation
    from phimlx.terminal.exchange import Exchange
    from phimlx.terminal.interrupt import Interruptible
    from phimlx.terminal.reply import print_reply, reply_stats, reply_summary

    output = Output(json=as_json)
    keeper = None if raw or in_file else open_keeper(private, output)
    limits = pop_limits(settings)
    saved: Conversation | None = None
    if continued:
        saved = Conversation.from_history(
            read_kept(LAST, keeper),
            limits,
            lambda question: output.can_ask and output.confirm(question),
        )
    check_files(source for _, source in files if isinstance(source, str))
    usual = MULTIMODAL if files else None
    flags = Flags(model, persona, adapter, system, tools_file, kv_bits, usual)
    begun = furnish(flags, settings, saved)
    conversation, kv_bits = begun.conversation, begun.kv_bits
    if begun.mcp:
        output.note(f"MCP servers are called in a chat alone: phimlx chat --persona {persona}")
    begin = Exchange.next if continued else Exchange.first
    exchange = begin(conversation, text, files, limits, frames, keeper)
    # Those of this answer alone; the others stay with the conversation.
    more: dict[str, Any] = {"kv_bits": kv_bits, "top_logprobs": top_logprobs}
    more |= {**shape, "tool_choice": tool_choice}
    if top_logprobs is not None:
        more["logprobs"] = True
    here = {
        "--adapter-path": begun.adapter or by_name,
        "--dtype": dtype,
        "--rope-scaling": rope_scaling,
        "--kv-bits": kv_bits,
        "--prompt-form": prompt_form,
        "--raw": raw,
        "--prompts": in_file,
        "--top-logprobs": top_logprobs is not None,
    }
    phi: Answerer | None = servers.find(begun.model, here, conversation.settings, output)
    if phi is None:
        phi = local = load_or_download(
            begun.model, output, begun.adapter, by_name, dtype=dtype, rope_scaling=rope_scaling
        )
        if prompt_form is not None:
            local.use_prompt_form(prompt_form)
        if prompts_file is not None and output_file is not None:
            from phimlx.terminal.prompt_file import answer_prompts

            own = given({**conversation.settings, **more})
            options = {"raw": raw, "tools": conversation.tools, "limits": limits, **own}
            about = [
                str(local.path.resolve()),
                str(begun.adapter),
                str(by_name),
                str(dtype),
                str(prompt_form),
                str(rope_scaling),
            ]
            rest = {
                "system": None if raw else conversation.system,
                "about": about,
                "batch_size": batch_size,
            }
            answer_prompts(local, prompts_file, output_file, options, output, **rest)
            return
    prefixes = prefix_store(phi, keeps, output)
    cache = None if prefixes is None else phi.new_cache(kv_bits, prefixes)
    with output.prompt_progress() as report:
        stream = phi.stream(
            text if raw else exchange.messages,
            raw=raw,
            tools=conversation.tools,
            on_prefill=report,
            **exchange.media,
            **given({**conversation.settings, **more, "cache": cache}),
        )
        exchange.keep_question()
        answer = Interruptible(stream)
        reply = print_reply(answer, output)
    if reply.text or not answer.interrupted:
        exchange.keep_answer(reply, reply_stats(reply))
    output.json(reply.as_object(phi.name))
    for warning in reply.warnings:
        output.warning(warning)
    if verbose or (output.is_watched and not as_json):
        output.note(reply_summary(reply))
    if prefixes is not None and cache is not None and not answer.cut:
        prefixes.save(cache)
    if answer.interrupted:
        raise KeyboardInterrupt
