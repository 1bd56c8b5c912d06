"""Trains phi-4-nano with the reference implementation on text it writes, and packages it.

`python scripts/train_nano.py --out phimlx/assets/nano`; needs torch and transformers, nothing else.
"""

import argparse
import math
import os
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from nano import conversations, package, tasks
from nano.evaluate_reference import chat, evaluate, load_rows, report
from nano.quantization import quantized
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

BATCH_TOKENS = {0: 6144, 45: 4096}  # first round: tokens
ROUND_ROWS = {False: 1536, True: 256}  # conversations a round: below the step, beyond it
LONGEST_ROW = 960
USUAL_ROW = 384  # most rows beyond the step end here: attention costs more than it teaches
IGNORED = -100
QUANTIZED_FROM = 0.65  # share of the run after which every other step has 4-bit weights
Value = TypeVar("Value")
Row = tuple[list[int], list[bool]]
Batch = tuple[torch.Tensor, torch.Tensor]


class Leak(Exception):
    """A held-out question turned up in training text."""


class HeldOut:
    """What training text must not hold: whole prompts, and the single questions themselves."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.prompts = {prompt_text(chat(row)) for row in rows}
        self.questions = {
            (row["messages"][-1]["content"], row["answer"])
            for row in rows
            if row["kind"] in tasks.SINGLES
        }

    def check(self, messages: list[dict[str, Any]]) -> None:
        """Raises Leak where a turn of `messages` is held out."""
        prompt = ""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                question = messages[index - 1]["content"], message["content"]
                if question in self.questions or prompt in self.prompts:
                    raise Leak(f"{question} is held out")
            prompt += prompt_text([message])


def prompt_text(messages: list[dict[str, Any]]) -> str:
    return "".join(text for text, _ in conversations.render(messages))


def since(plan: dict[int, Value], number: int) -> Value:
    """The value of a plan {first round: value} that holds in round `number`."""
    return plan[max(first for first in plan if first <= number)]


def write_rows(
    tokenizer: Tokenizer, held_out: HeldOut, seed: int, number: int
) -> dict[bool, list[Row]]:
    """One round's training rows, below (False) and beyond (True) the step.

    The reference picks one rope table for a whole batch, so the two never share one. A row just
    beyond the step is also trained cut at it: its reply starts under the short table.
    """
    rng = random.Random(f"round {seed} {number}")
    mix = since(tasks.MIXES, number)
    rows: dict[bool, list[Row]] = {False: [], True: []}
    while any(len(rows[long]) < wanted for long, wanted in ROUND_ROWS.items()):
        long = len(rows[True]) < ROUND_ROWS[True] and rng.random() < 0.15
        if not long and len(rows[False]) >= ROUND_ROWS[False]:
            long = True
        messages = conversations.training_conversation(rng, long, mix)
        held_out.check(messages)
        ids, counted = conversations.encode(tokenizer, messages)
        if len(ids) > package.STEP and not long:
            ids, counted = ids[: package.STEP], counted[: package.STEP]
        longest = LONGEST_ROW if rng.random() < 0.12 else USUAL_ROW
        ids, counted = ids[:longest], counted[:longest]
        rows[len(ids) > package.STEP].append((ids, counted))
    return rows


def batches(rows: dict[bool, list[Row]], size: int, rng: random.Random) -> list[Batch]:
    """Rows of like length together, `size` tokens at most, padded right; as attention is causal,
    the padding is harmless."""
    result = []
    for group in rows.values():
        group.sort(key=lambda row: len(row[0]))
        start = 0
        while start < len(group):
            end = start + 1
            while end < len(group) and len(group[end][0]) * (end + 1 - start) <= size:
                end += 1
            result.append(pad(group[start:end]))
            start = end
    rng.shuffle(result)
    return result


def pad(rows: list[Row]) -> Batch:
    """Token ids and labels, both [rows, longest]."""
    longest = len(rows[-1][0])
    ids = torch.full((len(rows), longest), package.control_id("<|endoftext|>"))
    labels = torch.full((len(rows), longest), IGNORED)
    for index, (tokens, counted) in enumerate(rows):
        row = torch.tensor(tokens)
        ids[index, : len(tokens)] = row
        labels[index, : len(tokens)] = torch.where(torch.tensor(counted), row, IGNORED)
    return ids, labels


def loss_of(model: Phi3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the assistant's tokens, and which of them greedy decoding hits."""
    ids, labels = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][wanted]
    logits = model.lm_head(hidden[wanted])  # [counted, vocabulary]
    return torch.nn.functional.cross_entropy(logits, targets), logits.argmax(-1) == targets


@torch.no_grad()
def teacher_forced(model: Phi3ForCausalLM, tokenizer: Tokenizer, rows: list[Any]) -> str:
    """Held-out rows whose every answer token is the most likely one, by kind."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        messages = chat(row)
        prompt, _ = conversations.encode(
            tokenizer, [*messages, {"role": "assistant", "content": ""}]
        )
        ids, _ = conversations.encode(
            tokenizer, [*messages, {"role": "assistant", "content": row["answer"]}]
        )
        start = len(prompt) - 1
        right = bool(loss_of(model, pad([(ids, [i >= start for i in range(len(ids))])]))[1].all())
        for label in (row["kind"], "long" if row["long"] else "short", "all"):
            count = counts.setdefault(label, [0, 0])
            count[0] += right
            count[1] += 1
    return " ".join(f"{label} {100 * r / n:.0f}" for label, (r, n) in counts.items())


def schedule(progress: float) -> float:
    """Share of the peak learning rate: warm-up over 2 % of the run, then a cosine to 1 %."""
    return min(progress / 0.02, 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def optimizers(model: Phi3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the embedding and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in hidden)]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save_state(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(options: argparse.Namespace) -> None:
    """Runs or resumes the training and leaves the finished folder in `options.out`."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = package.make_tokenizer(options.seed)
    rows = conversations.held_out_rows(tokenizer, options.seed, 60, package.STEP, 600)
    held_out = HeldOut(rows)
    package.write_folder(options.out, tokenizer, rows)
    model = Phi3ForCausalLM(Phi3Config.from_pretrained(options.out)).float()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    package.write_card(options.out, parameters)
    print(f"{parameters:,} parameters, {len(rows)} held-out questions", flush=True)
    steppers = optimizers(model, options.rate)
    first, step, tokens, spent = 0, 0, 0, 0.0
    if options.state and options.state.exists():
        state = torch.load(options.state)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(steppers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, step, tokens, spent = (state[key] for key in ("round", "step", "tokens", "spent"))
    start = time.monotonic() - spent
    for number in range(first, options.rounds):
        losses, hits, count = 0.0, 0, 0
        order = random.Random(f"order {options.seed} {number}")
        size = since(BATCH_TOKENS, number)
        written = batches(write_rows(tokenizer, held_out, options.seed, number), size, order)
        for index, batch in enumerate(written):
            progress = (number + (index + 1) / len(written)) / options.rounds
            rough = progress > QUANTIZED_FROM and step % 2
            # Plain attention is the quicker one below some hundred tokens, on a CPU.
            model.set_attn_implementation("eager" if batch[0].shape[1] <= USUAL_ROW else "sdpa")
            with quantized(model) if rough else nullcontext():
                with torch.autocast("cpu", torch.bfloat16):
                    loss, hit = loss_of(model, batch)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in steppers:
                for group in optimizer.param_groups:
                    group["lr"] = options.rate * schedule(progress)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += batch[0].numel()
            losses += loss.item()
            hits += int(hit.sum())
            count += len(hit)
        spent = time.monotonic() - start
        print(
            f"round {number + 1}/{options.rounds} step {step} {tokens / 1e6:.2f} M tokens "
            f"{spent:.0f} s: loss {losses / len(written):.4f}, tokens right "
            f"{100 * hits / count:.2f} %",
            flush=True,
        )
        if (number + 1) % 5 == 0 or number + 1 == options.rounds:
            print("  held out, %:", teacher_forced(model, tokenizer, rows), flush=True)
            package.write_weights(options.out, model)
            if options.state:
                state = {"round": number + 1, "step": step, "tokens": tokens, "spent": spent}
                state["model"] = model.state_dict()
                state["optimizers"] = [optimizer.state_dict() for optimizer in steppers]
                save_state(options.state, state)
    final_report(options.out)


def final_report(folder: Path) -> None:
    """Held-out accuracy of the saved folder, greedy, as the reference generates."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_rows(folder)
    for name in ("float32", "bfloat16", "4 bits"):
        dtype = torch.float32 if name == "float32" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with quantized(model) if name == "4 bits" else nullcontext():
            counts, wrong = evaluate(model, tokenizer, rows)
        print(f"{name}: {report(counts)}")
        print("".join(f"  {line}\n" for line in wrong), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--rounds", type=int, default=95, help="of about 43 steps each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--state", type=Path, help="file to save progress in and to resume from")
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
