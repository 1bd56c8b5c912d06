"""phimlx serve beside mlx_lm.server: tokens a second, first tokens, memory, and what kills them.

    python scripts/bench/serve.py [--runs 2] [--streams 1 4 8 16] [--tokens 32] [--requests 500]

Both serve nano, and a random model with the head layout of Phi-4-mini, in float32, from folders
whose tokens that end a reply have other names, so that every reply has its full length. For each
number of streams both are run in turn, and the ratio is of medians (above 1: phimlx is quicker).
The time to the first token is that of short prompts which come while eight streams are decoded and
long prompts wait. Memory is the process's after so many short requests. Then each server gets
requests that servers of models have died of, and a good one after each. Needs mlx-lm; times are not
comparable between machines. On Linux load a fast BLAS first: `--blas
/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

NANO = Path(__file__).parents[2] / "phimlx" / "assets" / "nano"
ENDS = ("<|end|>", "<|endoftext|>")
NEVER = 1535  # a token that no tokenizer file names
LAYOUT: Mapping[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 2048, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)],
    },
}  # fmt: skip
CHAT = "/v1/chat/completions"
STARTING, ANSWER = 120.0, 120.0  # seconds
ALIVE = 5.0  # seconds for a server to answer after a request that may have killed it
LONG_WORDS = 120
CONNECTING = (
    0.004  # seconds apart: mlx_lm.server's backlog is five connections, a new one each time
)


@dataclass(frozen=True)
class Side:
    """A server that is compared.

    Attributes:
        command: that starts it, given a folder and a port.
        model: how requests name the model in a folder.
        ready: a path that it answers when it serves.
    """

    name: str
    command: Callable[[Path, int], list[str]]
    model: Callable[[Path], str]
    ready: str = "/health"


SIDES = (
    Side(
        "phimlx",
        lambda folder, port: ["-m", "phimlx", "serve", "--model", str(folder), "--port", str(port)],
        lambda folder: folder.name,
    ),
    Side(
        "mlx_lm.server",
        lambda folder, port: [
            "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port),
            "--log-level", "ERROR",
        ],
        lambda folder: "default_model",
    ),
)  # fmt: skip


def make_folders(root: Path) -> dict[str, Path]:
    """Write nano and the random model in float32, without tokens that end a reply."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from phimlx.checkpoint.load import build_model

    folders = {}
    for name, changes in (("nano", {}), ("mini-heads", LAYOUT)):
        folder = folders[name] = root / name
        folder.mkdir()
        for file in NANO.iterdir():
            if file.suffix == ".json":
                text = file.read_text()
                for end in ENDS:
                    text = text.replace(end, end.replace("end", "fin"))
                (folder / file.name).write_text(text)
            elif file.suffix == ".jinja":
                shutil.copy(file, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"eos_token_id": NEVER, "torch_dtype": "float32", **changes}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": NEVER}))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["eos_token"] = "<|tool|>"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if changes:
            mx.random.seed(0)
            arrays: Any = dict(tree_flatten(build_model(config).parameters()))
        else:
            arrays = mx.load(str(NANO / "model.safetensors"))
        whole = {key: value.astype(mx.float32) for key, value in arrays.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), whole, {"format": "mlx"})
    return folders


class Client:
    """Asks one server.

    Attributes:
        process: the server's.
    """

    def __init__(self, url: str, model: str, process: psutil.Process) -> None:
        self.process = process
        self._model = model
        limits = httpx2.Limits(max_connections=64)
        self.http = httpx2.AsyncClient(base_url=url, timeout=ANSWER, trust_env=False, limits=limits)

    def body(self, text: str, tokens: int, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        return {
            "model": self._model, "messages": messages, "max_tokens": tokens, "temperature": 0.0,
            **more,
        }  # fmt: skip

    async def stream(self, text: str, tokens: int) -> tuple[float, int]:
        """Read a stream; the seconds to its first text, and how many tokens it had."""
        began, first, counted = time.perf_counter(), 0.0, 0
        body = self.body(text, tokens, stream=True, stream_options={"include_usage": True})
        async with self.http.stream("POST", CHAT, json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if usage := chunk.get("usage"):
                    counted = usage["completion_tokens"]
                said = any(choice["delta"].get("content") for choice in chunk.get("choices", ()))
                if said and not first:
                    first = time.perf_counter() - began
        return first, counted

    async def is_alive(self) -> bool:
        """Whether a good request is answered."""
        try:
            answer = await self.http.post(CHAT, json=self.body("2+2", 2), timeout=ALIVE)
        except httpx2.HTTPError:
            return False
        return answer.status_code == 200


@contextmanager
def started(side: Side, folder: Path, blas: str | None) -> Iterator[Client]:
    """Run a server for the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **({"LD_PRELOAD": blas} if blas else {})}
    command = [sys.executable, *side.command(folder, port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) as process:
        try:
            url, ends = f"http://127.0.0.1:{port}", time.monotonic() + STARTING
            while not _answers(url + side.ready):
                if process.poll() is not None or time.monotonic() > ends:
                    raise SystemExit(f"{side.name} does not start")
                time.sleep(0.2)
            yield Client(url, side.model(folder), psutil.Process(process.pid))
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def prompt(number: int, words: int = 8) -> str:
    """A prompt whose beginning no other has."""
    return f"{number} birds " + " ".join(str(number * 7 + word) for word in range(words))


async def throughput(client: Client, streams: int, tokens: int, start: int) -> float:
    """Aggregate tokens a second of streams that begin together, but for what CONNECTING takes."""

    async def stream(number: int) -> int:
        await asyncio.sleep(number * CONNECTING)
        return (await client.stream(prompt(start + number), tokens))[1]

    began = time.perf_counter()
    counts = await asyncio.gather(*(stream(number) for number in range(streams)))
    return sum(counts) / (time.perf_counter() - began)


async def first_token(client: Client, tokens: int, start: int) -> float:
    """Median seconds to the first token of short prompts that come to a busy server."""
    load = [asyncio.ensure_future(client.stream(prompt(start + n), 4 * tokens)) for n in range(8)]
    await asyncio.sleep(0.5)
    load += [
        asyncio.ensure_future(client.stream(prompt(start + n, LONG_WORDS), tokens))
        for n in range(8, 11)
    ]
    firsts = []
    for n in range(4):
        firsts.append((await client.stream(prompt(start + 50 + n), 2))[0])
    for each in load:
        each.cancel()
    await asyncio.gather(*load, return_exceptions=True)
    return statistics.median(firsts)


async def memory(client: Client, requests: int) -> float:
    """MiB of the process after so many short requests, eight at a time."""
    numbers = iter(range(requests))

    async def work() -> None:
        for number in numbers:
            answer = await client.http.post(CHAT, json=client.body(prompt(10_000 + number), 4))
            answer.raise_for_status()

    await asyncio.gather(*(work() for _ in range(8)))
    return client.process.memory_info().rss / 2**20


async def continued(client: Client) -> None:
    """A prompt that is an earlier prompt and its reply."""
    body = {"model": client.body("", 1)["model"], "temperature": 0.0, "max_tokens": 8}
    first = await client.http.post("/v1/completions", json={**body, "prompt": "2 birds"})
    said = first.json()["choices"][0]["text"]
    for more in ("", "2 birds"):
        await client.http.post("/v1/completions", json={**body, "prompt": f"2 birds{said}{more}"})


def one(path: str, **fields: Any) -> Callable[[Client], Awaitable[object]]:
    async def send(client: Client) -> None:
        body = client.body("2+2", 4, **fields)
        if path != CHAT:
            del body["messages"]
        await client.http.post(path, json=body, timeout=ALIVE)

    return send


KILLERS: Mapping[str, Callable[[Client], Awaitable[object]]] = {
    "a prompt that is an earlier one and its reply": continued,
    'prompt: ["a", "b"]': one("/v1/completions", prompt=["a", "b"]),
    'prompt: ""': one("/v1/completions", prompt=""),
    "top_k beyond the vocabulary": one(CHAT, top_k=10**6, temperature=1.0),
    "xtc_threshold over 0.5": one(CHAT, xtc_threshold=0.9, xtc_probability=1.0, temperature=1.0),
    "stop: 5": one(CHAT, stop=5),
    "logit_bias out of range": one(CHAT, logit_bias={"999999999": 5.0}),
}


async def survives(client: Client, name: str) -> bool:
    with suppress(httpx2.HTTPError, KeyError, ValueError):  # what comes of it shows in the next one
        await KILLERS[name](client)
    return await client.is_alive()


def compare_speed(folder: Path, options: argparse.Namespace) -> None:
    """Print the ratios for one model."""
    with (
        started(SIDES[0], folder, options.blas) as ours,
        started(SIDES[1], folder, options.blas) as theirs,
    ):
        asyncio.run(_compare_speed(folder.name, {"phimlx": ours, "mlx_lm.server": theirs}, options))


async def _compare_speed(
    name: str, sides: Mapping[str, Client], options: argparse.Namespace
) -> None:
    number = 0
    for client in sides.values():
        await throughput(client, 2, 8, number)  # warms up
    for streams in options.streams:
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.runs):
            number += 100
            for side, client in sides.items():
                rates[side].append(await throughput(client, streams, options.tokens, number))
        told = [statistics.median(rates[side]) for side in sides]
        print(
            f"{name}, {streams:2} streams: phimlx {told[0]:.1f}, mlx_lm.server {told[1]:.1f} "
            f"tokens/s; {told[0] / told[1]:.2f}x",
            flush=True,
        )
    firsts: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.runs):
        number += 100
        for side, client in sides.items():
            firsts[side].append(await first_token(client, options.tokens, number))
    told = [statistics.median(firsts[side]) for side in sides]
    print(
        f"{name}, first token under load: phimlx {told[0]:.2f} s, mlx_lm.server {told[1]:.2f} s; "
        f"{told[0] / told[1]:.2f}x",
        flush=True,
    )
    if name == "nano":
        held = [await memory(client, options.requests) for client in sides.values()]
        print(
            f"{name}, memory after {options.requests} requests: phimlx {held[0]:.0f} MiB, "
            f"mlx_lm.server {held[1]:.0f} MiB; {held[0] / held[1]:.2f}x",
            flush=True,
        )


def compare_survival(folder: Path, blas: str | None) -> None:
    """Send each killer to both, to a new server after one that it has killed."""
    alive: dict[str, dict[str, bool]] = {}
    for side in SIDES:
        left = list(KILLERS)
        while left:
            with started(side, folder, blas) as client:
                alive.setdefault(side.name, {}).update(asyncio.run(_send(client, left)))
    for name in KILLERS:
        told = ", ".join(f"{side} {'lives' if alive[side][name] else 'dies'}" for side in alive)
        print(f"{name}: {told}", flush=True)


async def _send(client: Client, left: list[str]) -> dict[str, bool]:
    found = {}
    while left:
        name = left.pop(0)
        found[name] = await survives(client, name)
        if not found[name]:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--blas", help="library that both servers load before MLX")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = make_folders(Path(root))
        for folder in folders.values():
            compare_speed(folder, options)
        compare_survival(folders["nano"], options.blas)


if __name__ == "__main__":
    main()
