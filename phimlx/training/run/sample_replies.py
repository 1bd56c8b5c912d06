"""Sample replies of a model in training, to prompts of its validation data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.batches import Example
from phimlx.training.run.events import SampleReply

MAX_TOKENS = 64


class SampleReplies:
    """Answers some examples, each from where learning begins in it on, greedily.

    Args:
        stop_tokens: that end a reply.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        stop_tokens: frozenset[int],
        examples: Sequence[Example],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_tokens = stop_tokens
        self.examples = examples

    def __call__(self, step: int) -> Iterator[SampleReply]:
        """Answer each example; adapters drop nothing meanwhile."""
        self.model.eval()
        try:
            for example in self.examples:
                yield self._answer(step, example)
        finally:
            self.model.train()

    def _answer(self, step: int, example: Example) -> SampleReply:
        if example.task is not None:
            tokens = self.tokenizer.encode(example.task.expected or "")
            example = Example(
                np.concatenate([example.tokens, np.array(tokens, np.int32)]),
                np.repeat([False, True], [len(example.tokens), len(tokens)]),
                example.source,
            )
        learned = np.flatnonzero(example.supervised)
        begin = max(1, int(learned[0])) if len(learned) else len(example.tokens)
        gaps = np.flatnonzero(~example.supervised[begin:])
        end = begin + int(gaps[0]) if len(gaps) else len(example.tokens)
        prompt = example.tokens[:begin].tolist()
        request = Request(prompt, Sampler(Sampling(), 0), MAX_TOKENS, self.stop_tokens)
        Engine(self.model).run_all([request])
        expected = self._shown(example.tokens[begin:end].tolist())[:MAX_TOKENS]
        texts = (prompt, expected, self._shown(request.reply.tokens))
        return SampleReply(step, example.source, *(self.tokenizer.decode(text) for text in texts))

    def _shown(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token not in self.stop_tokens]
