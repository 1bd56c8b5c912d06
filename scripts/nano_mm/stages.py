"""One training loop for every stage: optimizers, schedule, several processes, saved progress.

It knows neither pictures nor speech: a stage hands it parameters and a function that gives a loss.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

Step = Callable[[int, float], tuple[torch.Tensor, dict[str, float]]]


@dataclass
class Stage:
    """What a stage trains and for how long; `step(number, progress)` gives a loss and figures."""

    name: str
    modules: dict[str, nn.Module]  # saved and, where they ask for gradients, trained
    steps: int
    step: Step
    rates: dict[str, float]  # module -> peak learning rate
    evaluate: Callable[[], str] | None = None
    every: int = 100  # steps between evaluations, each of which saves
    report: int = 25


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def workers() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def say(*words: object) -> None:
    if rank() == 0:
        print(*words, flush=True)


def current(table: dict[float, Any], progress: float) -> Any:
    """What a table of beginnings, as shares of a stage, holds now."""
    return table[max(start for start in table if start <= progress)]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon (Jordan et al. 2024) suits it: a square-ish matrix that is no look-up table."""
    tables = ("position_embedding", "bias_values", "lora_")
    return parameter.ndim == 2 and min(parameter.shape) >= 32 and not any(t in name for t in tables)


def optimizers(stage: Stage) -> list[tuple[torch.optim.Optimizer, float]]:
    result: list[tuple[torch.optim.Optimizer, float]] = []
    for name, module in stage.modules.items():
        rate = stage.rates.get(name, 0.0)
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad and rate]
        matrices = [p for n, p in named if is_matrix(n, p) and "head" not in name]
        others = [p for n, p in named if not (is_matrix(n, p) and "head" not in name)]
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            )
            result.append((muon, rate))
        if others:
            adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
            result.append((adam, rate))
    return result


def schedule(progress: float) -> float:
    """Share of the peak rate: warm-up over 3 % of the stage, then a cosine to 2 %."""
    return min(progress / 0.03, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over all processes, in one exchange."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    distributed.all_reduce(flat)
    flat /= workers()
    start = 0
    for parameter in parameters:
        parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()


def save(path: Path, value: Any) -> None:
    partial = path.with_suffix(f".partial{os.getpid()}")
    torch.save(value, partial)
    partial.replace(path)


def learnt(model: nn.Module, trained: list[nn.Parameter]) -> dict[str, torch.Tensor]:
    """The model's trained parameters under their full names."""
    chosen = {id(parameter) for parameter in trained}
    return {n: p.detach().clone() for n, p in model.named_parameters() if id(p) in chosen}


def run(stage: Stage, model: nn.Module, folder: Path) -> None:
    """Runs a stage, or what is left of it, and leaves its progress in `folder`."""
    path = folder / f"{stage.name}.pt"
    trained = [
        p
        for name, module in stage.modules.items()
        for p in module.parameters()
        if p.requires_grad and stage.rates.get(name)
    ]
    steppers = optimizers(stage)
    first, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=False)
        for name, module in stage.modules.items():
            module.load_state_dict(state["modules"][name])
        if state["step"] >= stage.steps:
            return
        for (optimizer, _), saved in zip(steppers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent = state["step"], state["spent"]
    start = time.monotonic() - spent
    figures: list[dict[str, float]] = []
    for number in range(first, stage.steps):
        progress = (number + 1) / stage.steps
        loss, shown = stage.step(number, progress)
        loss.backward()
        asking = [parameter for parameter in trained if parameter.requires_grad]
        for parameter in asking:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if workers() > 1:
            average_gradients(asking)
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, rate in steppers:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(progress)
            optimizer.step()
            optimizer.zero_grad()
        figures.append({"loss": loss.item(), **shown})
        if (number + 1) % stage.report == 0:
            recent = figures[-stage.report :]
            names = dict.fromkeys(key for row in recent for key in row)
            means = []
            for key in names:
                values = [row[key] for row in recent if key in row and row[key] == row[key]]
                means.append(f"{key} {sum(values) / max(1, len(values)):.3f}")
            spent = time.monotonic() - start
            say(f"{stage.name} {number + 1}/{stage.steps} {spent:.0f} s:", ", ".join(means))
        if (number + 1) % stage.every == 0 or number + 1 == stage.steps:
            if rank() == 0:
                if stage.evaluate:
                    say("  held out:", stage.evaluate())
                state = {"step": number + 1, "spent": time.monotonic() - start}
                state["learnt"] = learnt(model, trained)
                state["modules"] = {n: m.state_dict() for n, m in stage.modules.items()}
                state["optimizers"] = [optimizer.state_dict() for optimizer, _ in steppers]
                save(path, state)
            if workers() > 1:
                distributed.barrier()
