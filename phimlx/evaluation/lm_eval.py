"""Tasks of EleutherAI's lm-evaluation-harness, run through mlx-lm's bridge with our own model.

Needs the extra "lm-eval".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from phimlx.api import Phi
from phimlx.errors import PromptError, TokenizerError, TrainingError
from phimlx.extras import import_extra
from phimlx.generation.nonfinite import nonfinite_error
from phimlx.generation.prefill import prefill
from phimlx.machine.reductions import log_softmax
from phimlx.models.base import CausalLM
from phimlx.models.cache.kv import Cache
from phimlx.training.loss import CHUNK_ROWS

SEED = 123  # mlx-lm's
MAX_TOKENS = 256  # of an answer, where its task names no number


def run_tasks(
    phi: Phi,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat_template: bool | None = None,
    include_path: str | Path | None = None,
    kv_bits: int | None = None,
) -> dict[str, dict[str, float]]:
    """Run tasks of the harness; its measures, by task and metric.

    Args:
        shots: examples before each question; the task's own number where None.
        limit: questions of each task.
        chat_template: whether questions are put as chats; where None, if the model has a template.
        include_path: a folder with tasks of one's own.
        kv_bits: 8 or 4, to hold keys and values quantized; as they come where None.

    Raises:
        TrainingError: where lm-eval is not installed, or has no such task.
    """
    without = "Tasks are lm-eval's, which is not installed."
    lm_eval = import_extra("lm_eval", "lm-eval", without, TrainingError)
    tasks_of = import_extra("lm_eval.tasks", "lm-eval", without, TrainingError)
    manager = tasks_of.TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise TrainingError(
            f"lm-eval has no task {', '.join(unknown)}.", hint="List them: lm-eval ls tasks"
        )
    if chat_template is None:
        chat_template = _has_template(phi)
    found: Mapping[str, Any] = lm_eval.simple_evaluate(
        model=_language_model(phi, batch_size, chat_template, kv_bits),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat_template,
        task_manager=manager,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
        bootstrap_iters=0,
    )
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """A task's measures by name, such as `acc`; a filter of answers that has a name stays in it."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }


def _has_template(phi: Phi) -> bool:
    try:
        return phi.template is not None
    except (PromptError, TokenizerError):
        return False


def _language_model(
    phi: Phi, batch_size: int, chat_template: bool, kv_bits: int | None = None
) -> Any:
    """mlx-lm's bridge to the harness, whose numbers come from our model."""
    from lm_eval.api.model import LM  # type: ignore[import-not-found, unused-ignore]
    from mlx_lm.evaluate import MLXLM

    if phi.tokenizer is None:
        raise TrainingError(f"{phi.path} holds no tokenizer.json, without which there is no text.")
    tokenizer = phi.tokenizer

    class Bridge(MLXLM):
        """Stands in for mlx-lm's own model and tokenizer with ours."""

        tokenizer_name = phi.name

        def __init__(self) -> None:
            LM.__init__(self)
            self._max_tokens = phi.context_length
            self._batch_size = batch_size
            self.use_chat_template = chat_template

        def _tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
            return [tuple(tokenizer.encode(text, control=chat_template)) for text in texts]

        def _process_prompt(
            self, prompt: Sequence[int], step_size: int | None = None
        ) -> tuple[mx.array, Cache]:
            cache = phi.model.make_cache(kv_bits=kv_bits)
            hidden = _hidden_states(phi.model, np.array([prompt]), None, cache)
            return log_softmax(phi.model.head(hidden[:, -1])), cache  # [1, vocab]

        def _score_fn(
            self, inputs: Any, cache: Cache | None = None, step_size: int | None = None
        ) -> tuple[mx.array, mx.array, mx.array]:
            """Log-probability of each token but the first `[rows, length - 1]`; lengths; which of
            them greedy decoding would choose."""
            rows = [np.array(row) for row in inputs]
            lengths = np.array([len(row) for row in rows])
            tokens = np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in rows])
            real = np.arange(tokens.shape[1]) < lengths[:, None]
            mask = None if real.all() else real[:, :-1]
            if cache is None:
                known = 0 if mask is not None else tokens.shape[1] - 1
                cache = phi.model.make_cache(known, kv_bits=kv_bits)
            hidden = _hidden_states(phi.model, tokens[:, :-1], mask, cache)
            scores, is_greedy = _scored(phi.model, hidden, mx.array(tokens[:, 1:]))
            return scores, mx.array(lengths), is_greedy & mx.array(real[:, 1:])

        def apply_chat_template(
            self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
        ) -> str:
            if add_generation_prompt:
                return tokenizer.decode(phi.encode(list(chat_history)))
            *before, last = chat_history
            return tokenizer.decode(phi.encode(before)) + str(last["content"])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            prompts = [list(self._tokenize([request.args[0]])[0]) for request in requests]
            rooms = [
                min(
                    int(request.args[1].get("max_gen_toks", MAX_TOKENS)),
                    phi.context_length - len(prompt),
                )
                for request, prompt in zip(requests, prompts, strict=True)
            ]
            found = [""] * len(prompts)
            for room in set(rooms):
                here = [index for index, own in enumerate(rooms) if own == room]
                replies = phi.generate_all(
                    [prompts[index] for index in here],
                    max_tokens=room,
                    batch_size=batch_size,
                    kv_bits=kv_bits,
                )
                for index, reply in zip(here, replies, strict=True):
                    stops = requests[index].args[1].get("until") or []
                    stops = [stops] if isinstance(stops, str) else stops
                    found[index] = _before(reply.text, stops)
            return found

    return Bridge()


def _hidden_states(
    model: CausalLM, tokens: np.ndarray, mask: np.ndarray | None, cache: Cache
) -> mx.array:
    """Hidden states of `[rows, length]` tokens after what a cache holds, `mask` 0 at padding."""
    length = tokens.shape[1]
    # Rows that are padded may stand on different sides of the LongRoPE step: fed whole, each is
    # known from the start.
    size = None if mask is None else length
    pieces = []
    for hidden in prefill(model, tokens, cache, attention_mask=mask, size=size):
        mx.eval(hidden, cache.state)
        if not mx.isfinite(hidden).all():
            raise nonfinite_error(model, tokens[0].tolist())
        pieces.append(hidden)
    return mx.concatenate(pieces, axis=1)


def _scored(model: CausalLM, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Log-probabilities of targets `[rows, length]`, and which greedy decoding would choose."""
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    scores, greedy = [], []
    for begin in range(0, math.prod(targets.shape), CHUNK_ROWS):
        here = slice(begin, begin + CHUNK_ROWS)
        logits = model.head(flat[here])  # [chunk, vocab]
        chosen = mx.take_along_axis(log_softmax(logits), wanted[here, None], axis=-1)
        scores.append(chosen.squeeze(-1))
        greedy.append(mx.argmax(logits, axis=-1) == wanted[here])
        mx.eval(scores[-1], greedy[-1])
    shape = targets.shape
    return mx.concatenate(scores).reshape(shape), mx.concatenate(greedy).reshape(shape)


def _before(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of its stops."""
    found = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]
