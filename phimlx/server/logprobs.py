"""Log-probabilities of tokens as OpenAI's and Ollama's API tell them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phimlx.api import Phi
from phimlx.generation.logprobs import TokenLogprob


def token_objects(phi: Phi, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Make objects of tokens, each with those that are likeliest in its place."""
    return [
        {
            **_token_object(phi, each.token, each.logprob),
            "top_logprobs": [_token_object(phi, *other) for other in each.top],
        }
        for each in logprobs
    ]


def _token_object(phi: Phi, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(phi, token)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def token_bytes(phi: Phi, token: int) -> bytes:
    """The bytes of a token; none where the model has no tokenizer."""
    return b"" if phi.tokenizer is None else phi.tokenizer.token_bytes(token)
