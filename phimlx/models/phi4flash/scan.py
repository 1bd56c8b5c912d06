"""The selective scan of a state space (Mamba, arXiv 2312.00752, section 3) in pieces.

A state follows each channel c: S_t = exp(Δ_t A) S_{t-1} + (Δ_t x_t) B_t and y_t = S_t · C_t. Tokens
stand in chunks that are stepped through side by side, each from no state but the first; then the
state that each begins with is carried from one to the next, and what it adds is added. Nothing
grows, for exp(Δ A) is never above 1, and only states of one step are there at a time.
"""

from __future__ import annotations

import mlx.core as mx

from phimlx.models.rope import fuse

CHUNK = 32  # tokens that are stepped through one after the other
STATES = 16 << 20  # bytes of states that are stepped side by side
RECOMPUTED = 2 << 20  # where all steps are there together, in the backward pass

# A step size that leaves nothing of a state: a sequence begins.
BEGINS = 1e30


def selective_scan(
    state: mx.array,
    delta: mx.array,
    inputs: mx.array,
    b: mx.array,
    c: mx.array,
    a: mx.array,
    recompute: bool = False,
) -> tuple[mx.array, mx.array]:
    """Scan tokens from a state on; all float32.

    Args:
        state: `[batch, inner, d_state]`.
        delta: step sizes, `[batch, length, inner]`; `BEGINS` where the state before is forgotten.
        inputs: step sizes times what comes in, `[batch, length, inner]`.
        b, c: how it enters the state, and how it is read, `[batch, length, d_state]`.
        a: below 0, `[inner, d_state]`.
        recompute: keep no states for the backward pass; compute them again.

    Returns:
        What is read, `[batch, length, inner]`, and the state after the last token.
    """
    scan = mx.checkpoint(_scan) if recompute else _scan
    size = CHUNK * max(1, (RECOMPUTED if recompute else STATES) // state.nbytes)
    read = []
    for begin in range(0, delta.shape[1], size):
        piece = slice(begin, begin + size)
        y, state = scan(state, delta[:, piece], inputs[:, piece], b[:, piece], c[:, piece], a)
        read.append(y)
    return (read[0] if len(read) == 1 else mx.concatenate(read, axis=1)), state


def last_state(
    state: mx.array, delta: mx.array, inputs: mx.array, b: mx.array, a: mx.array
) -> mx.array:
    """Compute the state after a few tokens; arguments as of `selective_scan`."""
    for token in range(delta.shape[1]):
        state = _advance(
            state, delta[:, token, :, None], a, inputs[:, token, :, None], b[:, token, None]
        )
    return state


@fuse
def _advance(
    state: mx.array, delta: mx.array, a: mx.array, inputs: mx.array, b: mx.array
) -> mx.array:
    return state * mx.exp(delta * a) + inputs * b


@fuse
def _fade(state: mx.array, delta: mx.array, a: mx.array) -> mx.array:
    return state * mx.exp(delta * a)


def _read(state: mx.array, c: mx.array) -> mx.array:
    return (state * c).sum(axis=-1)


def _scan(
    state: mx.array, delta: mx.array, inputs: mx.array, b: mx.array, c: mx.array, a: mx.array
) -> tuple[mx.array, mx.array]:
    batch, length, inner = delta.shape
    size = min(length, CHUNK)
    chunks = -(-length // size)

    def chunked(array: mx.array) -> mx.array:  # [batch, chunks, size, …]; behind the end all is 0
        padded = mx.pad(array, [(0, 0), (0, chunks * size - length), (0, 0)])
        return padded.reshape(batch, chunks, size, -1)

    delta, inputs, b, c = map(chunked, (delta, inputs, b, c))
    delta, inputs = delta[..., None], inputs[..., None]  # [batch, chunks, size, inner, 1]
    b, c = b[:, :, :, None], c[:, :, :, None]  # [batch, chunks, size, 1, d_state]
    zeros = mx.zeros((batch, chunks - 1, *state.shape[1:]), state.dtype)
    states = mx.concatenate([state[:, None], zeros], axis=1)  # [batch, chunks, inner, d_state]
    read = []
    for token in range(size):
        states = _advance(states, delta[:, :, token], a, inputs[:, :, token], b[:, :, token])
        read.append(_read(states, c[:, :, token]))
    last = states[:, 0]
    if chunks > 1:
        faded = delta.sum(axis=2)  # [batch, chunks, inner, 1]
        begins = [mx.zeros_like(last)]
        for chunk in range(1, chunks):
            begins.append(last)
            last = states[:, chunk] + _fade(last, faded[:, chunk], a)
        carried = mx.stack(begins, axis=1)  # [batch, chunks, inner, d_state]
        for token in range(size):
            carried = _fade(carried, delta[:, :, token], a)
            read[token] = read[token] + _read(carried, c[:, :, token])
    y = mx.stack(read, axis=2).reshape(batch, chunks * size, inner)
    return y[:, :length], last
