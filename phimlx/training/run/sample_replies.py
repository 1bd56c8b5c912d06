"""Sample replies of a model in training, to prompts of its validation data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from phimlx.generation.engine import PromptCache, generate_tokens
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
        learned = np.flatnonzero(example.supervised)
        begin = max(1, int(learned[0]))
        gaps = np.flatnonzero(~example.supervised[begin:])
        end = begin + int(gaps[0]) if len(gaps) else len(example.tokens)
        prompt = example.tokens[:begin].tolist()
        answer = []
        sampler = Sampler(Sampling(), 0, prompt)
        tokens = generate_tokens(self.model, prompt, sampler, MAX_TOKENS, PromptCache(self.model))
        for token in tokens:
            if token in self.stop_tokens:
                break
            answer.append(token)
        tokens.close()
        expected = [t for t in example.tokens[begin:end].tolist() if t not in self.stop_tokens]
        texts = (prompt, expected[:MAX_TOKENS], answer)
        return SampleReply(step, example.source, *(self.tokenizer.decode(text) for text in texts))
