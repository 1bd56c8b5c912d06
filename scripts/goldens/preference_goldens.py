"""Losses of judged answers and their gradients, computed by torch in float64 from the papers.

    python scripts/goldens/preference_goldens.py tests/goldens/preference.safetensors

A tiny Phi-3 of transformers, whole and with LoRA beside every projection, whose weights and data
follow from `SEED` by numpy, so that tests make the same. Each equation is written here anew, one
sequence at a time over all logits: DPO (arXiv 2305.18290, eq. 7), ORPO (2403.07691, eqs. 3-7),
SimPO (2405.14734, eq. 6), CPO (2401.08417, eqs. 4-5), KTO (2402.01306, eq. 8) and GRPO (2402.03300,
eq. 3 with the divergence of eq. 4). Made with torch 2.13 and transformers 5.24, which phimlx itself
never needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid
from transformers import Phi3Config, Phi3ForCausalLM

SEED, RANK, SCALE = 29, 2, 1.5
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
KEPT = (  # of the gradients of all weights
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
)
NUMBERS = {"beta": 0.3, "gamma": 0.7, "lambda": 0.4, "desirable": 1.2, "undesirable": 0.8}
CLIP = 0.2
# Tokens of the prompt and of the answer; in pairs a better and a worse one in turn.
LENGTHS = ((9, 11), (9, 6), (7, 8), (7, 5), (6, 4), (6, 3), (4, 5), (4, 2))

Sequence = tuple[list[int], int]  # tokens, and how many of them are the prompt's


def data() -> list[Sequence]:
    random = np.random.default_rng(SEED)
    found: list[Sequence] = []
    for place, (asked, answered) in enumerate(LENGTHS):
        prompt = random.integers(0, 40, asked).tolist() if place % 2 == 0 else found[-1][0][:asked]
        found.append((prompt + random.integers(0, 40, answered).tolist(), asked))
    return found


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name, drawn in the order of the names."""
    random = np.random.default_rng(SEED + 1)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    return {
        name: torch.tensor(
            random.standard_normal(shapes[name]).astype(np.float32) * 0.25 + ("norm" in name),
        )
        for name in sorted(shapes)
    }


class Adapted(torch.nn.Module):
    """A projection with LoRA beside it, as (x A) B."""

    def __init__(self, linear: torch.nn.Linear, random: np.random.Generator) -> None:
        super().__init__()
        height, width = linear.weight.shape
        self.linear, self.on = linear, True
        drawn = [random.standard_normal(s).astype(np.float32) * 0.2
                 for s in ((width, RANK), (RANK, height))]  # fmt: skip
        self.lora_a, self.lora_b = (torch.nn.Parameter(torch.tensor(each).double())
                                    for each in drawn)  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.on * SCALE * (x @ self.lora_a) @ self.lora_b


class Policy:
    """The model, and what it was before training."""

    def __init__(self, kind: str) -> None:
        config = Phi3Config(
            **SHAPE,
            tie_word_embeddings=True,
            pad_token_id=None,  # whose embedding gets no gradient in torch
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attn_implementation="eager",
        )
        self.model, self.old = (Phi3ForCausalLM(config).double() for _ in range(2))
        before = parameters(self.model)
        for model in (self.model, self.old):
            model.load_state_dict(before, strict=False)
        self.adapted: dict[str, Adapted] = {}
        random = np.random.default_rng(SEED + 2)
        if kind == "lora":
            self.model.requires_grad_(False)
            linears = {n: m for n, m in self.model.named_modules()
                       if isinstance(m, torch.nn.Linear) and n != "lm_head"}  # fmt: skip
            for name in sorted(linears):
                self.adapted[name] = Adapted(linears[name], random)
                parent, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(parent), last, self.adapted[name])
            return
        with torch.no_grad():  # a model that training has moved
            for name in sorted(before):
                moved = random.standard_normal(before[name].shape).astype(np.float32) * 0.03
                self.model.get_parameter(name).add_(torch.tensor(moved).double())

    def logps(self, sequence: Sequence) -> torch.Tensor:
        """Log-probabilities of an answer's tokens."""
        return answer_logps(self.model, sequence)

    def base(self, sequence: Sequence) -> torch.Tensor:
        """The same before training."""
        with torch.no_grad():
            return answer_logps(self.old, sequence)

    def gradients(self) -> dict[str, torch.Tensor]:
        if self.adapted:
            return {
                f"{name}.{each}": getattr(module, each).grad
                for name, module in self.adapted.items()
                for each in ("lora_a", "lora_b")
            }
        return {name: self.model.get_parameter(name).grad for name in KEPT}


def answer_logps(model: torch.nn.Module, sequence: Sequence) -> torch.Tensor:
    tokens, asked = sequence
    logits = model(torch.tensor([tokens])).logits[0, asked - 1 : -1]
    return logits.log_softmax(-1)[range(len(tokens) - asked), tokens[asked:]]


Result = tuple[torch.Tensor, dict[str, float]]
Pairs = Callable[[Policy, Sequence, Sequence], tuple[torch.Tensor, torch.Tensor]]


def over_pairs(each: Pairs) -> Callable[[Policy], Result]:
    def loss(policy: Policy) -> Result:
        rows = data()
        found = [each(policy, *rows[i : i + 2]) for i in range(0, len(rows), 2)]
        losses, margins = map(torch.stack, zip(*found, strict=True))
        told = {
            "accuracy": float((margins > 0).double().mean()),
            "margin": float(margins.mean().detach()),
        }
        return losses.mean(), told

    return loss


def dpo(policy: Policy, better: Sequence, worse: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    ratios = [policy.logps(each).sum() - policy.base(each).sum() for each in (better, worse)]
    margin = NUMBERS["beta"] * (ratios[0] - ratios[1])
    return -logsigmoid(margin), margin


def orpo(policy: Policy, better: Sequence, worse: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    likelihoods = [policy.logps(each).mean().exp() for each in (better, worse)]
    odds = [each / (1 - each) for each in likelihoods]
    ratio = (odds[0] / odds[1]).log()
    return -likelihoods[0].log() - NUMBERS["lambda"] * logsigmoid(ratio), ratio


def simpo(policy: Policy, better: Sequence, worse: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = [NUMBERS["beta"] * policy.logps(each).sum() / (len(each[0]) - each[1])
               for each in (better, worse)]  # fmt: skip
    margin = rewards[0] - rewards[1]
    return -logsigmoid(margin - NUMBERS["gamma"]), margin


def cpo(policy: Policy, better: Sequence, worse: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    margin = NUMBERS["beta"] * (policy.logps(better).sum() - policy.logps(worse).sum())
    return -logsigmoid(margin) - NUMBERS["lambda"] * policy.logps(better).mean(), margin


def kto(policy: Policy) -> Result:
    """Answers in turn good and bad; all are one batch."""
    rows = data()
    others = [(asked[0][: asked[1]] + other[0][other[1] :], asked[1])
              for asked, other in zip(rows, [*rows[1:], rows[0]], strict=True)]  # fmt: skip
    with torch.no_grad():
        drift = torch.stack([policy.logps(o).sum() - policy.base(o).sum() for o in others]).mean()
        point = drift.clamp(min=0)
    losses, margins = [], []
    for place, row in enumerate(rows):
        reward = policy.logps(row).sum() - policy.base(row).sum()
        good = place % 2 == 0
        margins.append(NUMBERS["beta"] * (reward - point) * (1 if good else -1))
        weight = NUMBERS["desirable" if good else "undesirable"]
        losses.append(weight - weight * torch.sigmoid(margins[-1]))
    told = torch.stack(margins)
    accuracy = float((told > 0).double().mean())
    metrics = {"accuracy": accuracy, "margin": float(told.mean().detach()), "kl": float(point)}
    return torch.stack(losses).mean(), metrics


def grpo_data() -> tuple[np.ndarray, list[np.ndarray]]:
    """Advantages of the answers, and by how much what drew them differed from the model now."""
    random = np.random.default_rng(SEED + 3)
    advantages = random.standard_normal(len(LENGTHS)).astype(np.float32)
    return advantages, [random.normal(0, 0.3, n).astype(np.float32) for _, n in LENGTHS]


def grpo(policy: Policy) -> Result:
    advantages, drifts = grpo_data()
    losses, divergences = [], []
    for place, row in enumerate(data()):
        now = policy.logps(row)
        ratio = (now - now.detach() - torch.tensor(drifts[place]).double()).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        gain = torch.minimum(ratio * advantages[place].item(), clipped * advantages[place].item())
        away = policy.base(row) - now
        divergence = away.exp() - away - 1
        losses.append(-(gain - NUMBERS["beta"] * divergence).mean())
        divergences.append(divergence.mean())
    return torch.stack(losses).mean(), {"kl": float(torch.stack(divergences).mean().detach())}


LOSSES = {
    **{name: over_pairs(each) for name, each in
       {"dpo": dpo, "orpo": orpo, "simpo": simpo, "cpo": cpo}.items()},
    "kto": kto,
    "grpo": grpo,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, Any] = {"seed": SEED, "numbers": NUMBERS, "torch": torch.__version__}
    for method, loss in LOSSES.items():
        for kind in ("lora", "full"):
            policy = Policy(kind)
            value, metrics = loss(policy)
            value.backward()
            about[f"{method}/{kind}"] = {"loss": float(value.detach()), **metrics}
            for name, gradient in policy.gradients().items():
                tensors[f"{method}/{kind}/{name}"] = gradient.float().contiguous()
    save_file(tensors, sys.argv[1], {"about": json.dumps(about)})
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
