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
from phimlx.training.data.media import MediaReader
from phimlx.training.data.statistics import rendered
from phimlx.training.run.events import SampleReply

MAX_TOKENS = 64


class SampleReplies:
    """Answers some examples, each from where learning begins in it on, greedily.

    Args:
        stop_tokens: that end a reply.
        media: opens pictures and sounds of the examples; None where there are none.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        stop_tokens: frozenset[int],
        examples: Sequence[Example],
        media: MediaReader | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_tokens = stop_tokens
        self.examples = examples
        self.media = media

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
        shown = [item for item in example.media if item.begin < begin]
        media = self.media.placed(shown) if shown and self.media is not None else None
        request = Request(prompt, Sampler(Sampling(), 0), MAX_TOKENS, self.stop_tokens, media)
        Engine(self.model).run_all([request])
        expected = self._shown(example.tokens[begin:end].tolist())[:MAX_TOKENS]
        asked = "".join(text for text, _ in rendered(example.beginning(begin), self.tokenizer))
        texts = (expected, self._shown(request.reply.tokens))
        said = (self.tokenizer.decode(text) for text in texts)
        return SampleReply(step, example.source, asked, *said)

    def _shown(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token not in self.stop_tokens]
