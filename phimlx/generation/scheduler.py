"""Continuous batching: requests join the rows that are decoded, and leave them, between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from phimlx.errors import GenerationError, PhimlxError
from phimlx.generation.batch import Batch
from phimlx.generation.reply import Chunk
from phimlx.generation.request import Request
from phimlx.machine.device import prefill_tokens
from phimlx.machine.kv_bits import KV_BITS, kv_group_size
from phimlx.machine.memory import (
    cache_bytes_per_token,
    dequantized_bytes_per_token,
    footprint,
    machine_memory,
)
from phimlx.models.base import CausalLM
from phimlx.sizes import size_text

MAX_ROWS = 16
RESERVED = 2048  # tokens of a reply that a forecast counts, however many it may have


class Scheduler:
    """Admits requests, prefills their prompts in pieces, and decodes all in one batch.

    A step is a piece of a prompt at most, and one token for every row: nobody waits for another's
    prompt longer than a piece takes. Requests are admitted in the order in which they came, as
    there are rows and memory for them; short prompts that wait together are prefilled together.
    Rows have the same `kv_bits`: a request that has others waits until they have ended.

    Args:
        pass_cost: as `Batch` takes it.
        on_admit: called with each request whose turn has come.
        max_rows: of the batch.
        memory: bytes that keys and values may take; what is left beside the weights where None.
    """

    def __init__(
        self,
        model: CausalLM,
        pass_cost: Callable[[int], float],
        on_admit: Callable[[Request], object] = lambda request: None,
        max_rows: int = MAX_ROWS,
        memory: int | None = None,
    ) -> None:
        self._model = model
        self._pass_cost = pass_cost
        self._on_admit = on_admit
        self._max_rows = max_rows
        self._memory = memory
        self._found: tuple[frozenset[str], int] | None = None  # with which adapters, how much
        self._waiting: deque[Request] = deque()
        self._prompts: Batch | None = None  # being prefilled, or about to join
        self._rows: Batch | None = None

    def add(self, requests: Iterable[Request]) -> None:
        """Let requests wait for their turn.

        Raises:
            GenerationError: for one whose keys and values would never fit, or whose adapter is not
                there.
        """
        requests = list(requests)
        for request in requests:
            self._check(request)
        self._waiting.extend(requests)

    def step(self) -> list[tuple[Request, Chunk]]:
        """Compute a piece of a prompt, and a token of every row.

        A request whose media do not fit its prompt ends with that error, and no other with it.
        """
        self.settle()
        self._admit()
        chunks = []
        if self._prompts is not None and not self._prompts.prefilled:
            self._prefill(self._prompts)
        if self._rows is not None:
            self._rows.may_draft = self._prompts is None
            chunks = self._rows.step()
        self.settle()
        if self._prompts is not None and self._prompts.prefilled:
            if self._rows is None:
                self._rows, self._prompts = self._prompts, None
            elif self._rows.can_be_joined:
                self._rows.join(self._prompts)
                self._prompts = None
        return chunks

    def cancel_all(self) -> None:
        """End every request."""
        for request in self.requests:
            request.cancel()
        self.settle()

    @property
    def requests(self) -> list[Request]:
        """Those that have not ended."""
        batches = [batch for batch in (self._prompts, self._rows) if batch is not None]
        found = [*self._waiting, *(request for batch in batches for request in batch.requests)]
        return [request for request in found if not request.finished]

    def settle(self) -> None:
        """Let go of batches that have ended, and of those who stopped waiting."""
        if any(request.finished for request in self._waiting):
            self._waiting = deque(request for request in self._waiting if not request.finished)
        if self._prompts is not None and self._prompts.done:
            self._prompts = None
        if self._rows is not None:
            self._rows.drop_finished()
            if self._rows.done:
                self._rows = None

    def _prefill(self, prompts: Batch) -> None:
        try:
            prompts.step()
        except PhimlxError as error:
            for request in prompts.requests:
                request.cancel(error)

    def _admit(self) -> None:
        """Begin the prompts that are next, where none is being prefilled."""
        if self._prompts is not None or not self._waiting:
            return
        decoded = [] if self._rows is None else self._rows.requests
        group: list[Request] = []
        while self._waiting and self._may_join(self._waiting[0], group, decoded):
            group.append(self._waiting.popleft())
        for request in group:
            self._on_admit(request)
        if group:
            self._prompts = Batch(self._model, group, self._pass_cost)

    def _may_join(self, request: Request, group: list[Request], decoded: list[Request]) -> bool:
        """Whether there is a row and memory for a request, and its prompt goes with the group's."""
        others = [*decoded, *group]
        if len(others) >= self._max_rows:
            return False
        if any(each.kv_bits != request.kv_bits for each in others):
            return False
        if group:
            if request.media is not None or group[0].media is not None:
                return False  # alone, so that what is wrong with them ends nobody else
            if (request.prompt_logprobs is None) != (group[0].prompt_logprobs is None):
                return False  # a prompt that is scored takes longer
            longest = max(len(each.prompt) for each in (*group, request))
            if longest * (1 + len(group)) > prefill_tokens():
                return False
        if not others:
            return True
        columns = max(_columns(each) for each in (*others, request))
        return (1 + len(others)) * columns * self._bytes_per_token(request.kv_bits) <= self._left

    def _check(self, request: Request) -> None:
        self._model.check_adapter(request.adapter)
        needed = _columns(request) * self._bytes_per_token(request.kv_bits)
        if needed > self._left:
            enough = [
                bits
                for bits in KV_BITS
                if request.kv_bits is None
                and kv_group_size(self._model.config.head_dim) is not None
                and _columns(request) * self._bytes_per_token(bits) <= self._left
            ]
            smaller = (
                f" It fits with kv_bits={enough[0]} (--kv-bits {enough[0]})." if enough else ""
            )
            raise GenerationError(
                f"The prompt has {len(request.prompt):,} tokens, whose keys and values and those "
                f"of the reply take {size_text(needed)}; {size_text(max(0, self._left))} are left "
                "beside the model.",
                hint=f"Shorten the prompt.{smaller}",
            )

    def _bytes_per_token(self, kv_bits: int | None) -> int:
        """Bytes of a token's keys and values, and of what is dequantized of them at a time."""
        shape, itemsize = self._model.config, self._itemsize
        held = cache_bytes_per_token(shape, itemsize, kv_bits)
        return held + dequantized_bytes_per_token(shape, itemsize, kv_bits)

    @property
    def _itemsize(self) -> int:
        """Bytes of a number as the model computes."""
        return self._model.embed(mx.zeros((1, 1), mx.int32)).dtype.size

    @property
    def _left(self) -> int:
        """Bytes that keys and values may take."""
        if self._memory is not None:
            return self._memory
        adapters = self._model.loaded_adapters
        if self._found is None or self._found[0] != adapters:
            parameters: Any = tree_flatten(self._model.parameters())
            weights = sum(array.nbytes for _, array in parameters)
            held = footprint(self._model.config, weights, prefill_tokens(), self._itemsize)
            self._found = adapters, machine_memory() - held.weights - held.working
        return self._found[1]


def _columns(request: Request) -> int:
    """Tokens of prompt and reply, as far as they are forecast."""
    return len(request.prompt) + min(request.max_tokens, RESERVED)
