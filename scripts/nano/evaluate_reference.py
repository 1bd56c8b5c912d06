"""Held-out accuracy of a phi-4-nano folder through `transformers`, greedy, one row at a time.

`python scripts/nano/evaluate_reference.py FOLDER [--dtype bfloat16]`; it knows no other runtime.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CALL, CALL_END = "<|tool_call|>", "<|/tool_call|>"


def chat(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's messages as Phi-4-mini's template takes them: tools as JSON in a system message."""
    messages = [dict(message) for message in row["messages"]]
    for message in messages:
        if calls := message.get("tool_calls"):
            message["content"] = f"{CALL}{json.dumps(calls)}{CALL_END}"
    if tools := row.get("tools"):
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = json.dumps(tools)
    return messages


def correct(reply: str, answer: str) -> bool:
    """Equal text, or for tool calls the same names and arguments as parsed JSON."""
    reply, answer = reply.strip(), answer.strip()
    if not answer.startswith(CALL):
        return reply == answer
    if not (reply.startswith(CALL) and reply.endswith(CALL_END)):
        return False
    try:
        calls = json.loads(reply.removeprefix(CALL).removesuffix(CALL_END))
    except json.JSONDecodeError:
        return False
    return calls == json.loads(answer.removeprefix(CALL).removesuffix(CALL_END))


def evaluate(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]]
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Right and asked by kind, by length and overall; and the wrong answers in words."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    wrong = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            chat(row), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        ids = output[0, prompt["input_ids"].shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        reply = tokenizer.decode([token for token in ids if token not in ends])
        right = correct(reply, row["answer"])
        if not right:
            question = row["messages"][-1]["content"]
            wrong.append(f"{row['kind']}: {question!r} -> {reply!r}, not {row['answer']!r}")
        for label in (row["kind"], "long" if row["long"] else "short", "all"):
            counts[label][0] += right
            counts[label][1] += 1
    return {label: (right, asked) for label, (right, asked) in counts.items()}, wrong


def report(counts: Mapping[str, tuple[int, int]]) -> str:
    return "  ".join(
        f"{label} {right}/{asked} ({100 * right / asked:.1f} %)"
        for label, (right, asked) in counts.items()
    )


def load_rows(folder: Path) -> list[dict[str, Any]]:
    with (folder / "heldout.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--verbose", action="store_true", help="list the wrong answers")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=getattr(torch, arguments.dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    counts, wrong = evaluate(model, tokenizer, load_rows(arguments.folder))
    print(f"{arguments.dtype}: {report(counts)}")
    if arguments.verbose:
        print("\n".join(wrong))


if __name__ == "__main__":
    main()
