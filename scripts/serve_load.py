"""Ask a server thousands of mixed requests, and see what is left of them.

    python scripts/serve_load.py [--requests 2000] [--warm 200] [--at-once 12] [--log FILE]

It starts `phimlx serve` on a free port and asks every surface, streaming and not; a tenth of the
requests hang up, a tenth are malformed. In the end every good one must have been answered in full,
every malformed one refused with 4xx, the server's memory must not have grown by more than 5 % since
the first `--warm` requests (it is told after every so many), and no file descriptor may be left.
Prompts come again, for what the server keeps of them is not what is looked for. Exit status 1 where
anything of it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

CLIPS = Path(__file__).parents[1] / "phimlx" / "assets" / "nano-multimodal"
SECONDS = 120.0
PROMPTS = 4  # of each kind
GROWTH = 0.05
SETTLE_SECONDS = 30.0

Body = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of request.

    Attributes:
        body: makes it, given a number; of a form where it has a file.
        ends: what the whole answer holds last or anywhere, where it is whole.
        file: of a form; None for JSON.
    """

    path: str
    body: Callable[[int], Body]
    ends: str
    file: Path | None = None


def question(number: int) -> str:
    return f"Tell me a story of {number % PROMPTS} birds."


def messages(number: int) -> list[Body]:
    return [{"role": "user", "content": question(number)}]


def chat(number: int, **more: Any) -> Body:
    options = {"max_tokens": 16, "temperature": number % 2, "seed": number % PROMPTS}
    return {"model": "nano", "messages": messages(number), **options, **more}


def claude(number: int, **more: Any) -> Body:
    return {"model": "nano", "messages": messages(number), "max_tokens": 16, **more}


def llama(number: int, **more: Any) -> Body:
    options = {"num_predict": 16, "seed": number % PROMPTS}
    return {"model": "nano", "options": options, **more}


def picture(number: int) -> Body:
    file = sorted((CLIPS / "pictures").iterdir())[number % 4]
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}
    ]  # fmt: skip
    return chat(number, model="nano-multimodal", messages=[{"role": "user", "content": parts}])


CLIP = sorted((CLIPS / "clips").iterdir())[0]
GOOD = (
    Kind("/v1/chat/completions", chat, '"finish_reason"'),
    Kind("/v1/chat/completions", lambda n: chat(n, stream=True), "data: [DONE]"),
    Kind("/v1/chat/completions", lambda n: chat(n, n=3), '"index":2'),
    Kind("/v1/chat/completions", picture, '"finish_reason"'),
    Kind("/v1/completions", lambda n: {
        "model": "nano", "prompt": question(n), "max_tokens": 9, "seed": n % PROMPTS,
    }, '"finish_reason"'),
    Kind("/v1/completions", lambda n: {
        "model": "nano", "prompt": [question(n), "2+2"], "max_tokens": 9, "stream": True,
        "seed": n % PROMPTS,
    }, "data: [DONE]"),
    Kind("/v1/responses", lambda n: {
        "model": "nano", "input": question(n), "max_output_tokens": 16, "temperature": 0,
        "store": False,
    }, '"status"'),
    Kind("/v1/responses", lambda n: {
        "model": "nano", "input": question(n), "max_output_tokens": 16, "temperature": 0,
        "stream": True, "store": False,
    }, "response."),
    Kind("/v1/messages", lambda n: claude(n, temperature=0), '"stop_reason"'),
    Kind("/v1/messages", lambda n: claude(n, temperature=0, stream=True), "message_stop"),
    Kind("/v1/messages/count_tokens", lambda n: {
        "model": "nano", "messages": messages(n),
    }, '"input_tokens"'),
    Kind("/api/chat", lambda n: llama(n, messages=messages(n)), '"done":true'),
    Kind("/api/chat", lambda n: llama(n, messages=messages(n), stream=False), '"done":true'),
    Kind("/api/generate", lambda n: llama(n, prompt=question(n)), '"done":true'),
    Kind("/api/show", lambda n: {"model": "nano"}, '"capabilities"'),
    Kind("/v1/audio/transcriptions", lambda n: {
        "model": "nano-multimodal", "response_format": "json",
    }, '"text"', CLIP),
)  # fmt: skip
BAD: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", b"[]"),
    ("/v1/chat/completions", b"[" * 5000),
    ("/v1/chat/completions", chat(0, stop=5)),
    ("/v1/chat/completions", chat(0, messages=[])),
    ("/v1/chat/completions", chat(0, messages=[{"role": "nobody", "content": "x"}])),
    ("/v1/chat/completions", chat(0, n=99)),
    ("/v1/chat/completions", chat(0, temperature="hot")),
    ("/v1/chat/completions", chat(0, max_tokens=-1)),
    ("/v1/chat/completions", chat(0, model="../../etc/passwd")),
    ("/v1/chat/completions", chat(0, messages=[{"role": "user", "content": "x " * 9000}])),
    ("/v1/messages", {"model": "nano", "messages": messages(0)}),
    ("/v1/messages", claude(0, messages="x")),
    ("/api/chat", llama(0, messages=5)),
    ("/api/generate", {"model": "no-such-model", "prompt": "x"}),
    ("/v1/nowhere", {}),
)  # fmt: skip


@contextmanager
def server(command: list[str], log: Path | None) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server for the block; its address and its process."""
    with (
        open(log or os.devnull, "w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=kept, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("Serving at "):
                raise SystemExit("the server does not start")
            yield line.split()[2].partition("/v1")[0], psutil.Process(process.pid)
        finally:
            process.terminate()


class Load:
    """Asks, and counts what came of it.

    Attributes:
        counts: of "answered", "refused" and "hung up".
        failures: a sentence for each request with another outcome than it should have.
    """

    def __init__(self, client: httpx2.AsyncClient, kinds: list[Kind], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._client = client
        self._kinds = kinds
        self._seed = seed

    async def ask(self, numbers: range, at_once: int) -> None:
        waiting = iter(numbers)

        async def work() -> None:
            for number in waiting:
                try:
                    await self._ask(number)
                except httpx2.HTTPError as error:
                    self.failures.append(f"{number}: {error!r}")

        await asyncio.gather(*(work() for _ in range(at_once)))

    async def _ask(self, number: int) -> None:
        rng = random.Random(self._seed * 1_000_003 + number)
        chance = rng.random()
        if chance < 0.1:
            path, body = rng.choice(BAD)
            given = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = await self._client.post(path, **given)
            if 400 <= answer.status_code < 500 and answer.status_code != 422:
                self.counts["refused"] += 1
            else:
                self.failures.append(f"{number}: {path} {str(body)[:80]}: {answer.status_code}")
            return
        kind = rng.choice(self._kinds)
        if chance < 0.2:
            await self._hang_up(kind, rng)
            self.counts["hung up"] += 1
            return
        answer = await self._client.post(kind.path, **self._given(kind, number))
        if answer.status_code == 200 and kind.ends in answer.text.replace('": ', '":'):
            self.counts["answered"] += 1
        else:
            self.failures.append(f"{number}: {kind.path}: {answer.status_code} {answer.text[:200]}")

    async def _hang_up(self, kind: Kind, rng: random.Random) -> None:
        """Go away before the answer, or in the middle of it."""
        given = self._given(kind, rng.randrange(PROMPTS))
        if rng.random() < 0.5:
            with suppress(httpx2.TimeoutException):
                await self._client.post(kind.path, **given, timeout=rng.random() / 20)
        else:
            async with self._client.stream("POST", kind.path, **given) as answer:
                async for _ in answer.aiter_raw():
                    return

    def _given(self, kind: Kind, number: int) -> dict[str, Any]:
        if kind.file is None:
            return {"json": kind.body(number)}
        return {"data": kind.body(number), "files": {"file": ("a.flac", kind.file.read_bytes())}}


async def existing(client: httpx2.AsyncClient) -> list[Kind]:
    """Find the kinds whose surface the server has."""
    there = {}
    for path in {kind.path for kind in GOOD}:
        there[path] = (await client.post(path, content=b"{")).status_code != 404
    for path, found in there.items():
        if not found:
            print(f"there is no {path} here")
    return [kind for kind in GOOD if there[kind.path]]


async def settle(client: httpx2.AsyncClient) -> None:
    """Wait until nothing runs."""
    ends = time.monotonic() + SETTLE_SECONDS
    while (await client.get("/health")).json()["running"]:
        if time.monotonic() > ends:
            raise SystemExit("requests are still running, long after all have been answered")
        await asyncio.sleep(0.1)


async def array_bytes(client: httpx2.AsyncClient) -> int:
    """Read what arrays take: weights, and what is kept of prompts."""
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("phimlx_memory_bytes "):
            return int(float(line.split()[1]))
    raise SystemExit("the server does not tell its memory")


async def run(url: str, process: psutil.Process, options: argparse.Namespace) -> list[str]:
    """Ask everything; the sentences on what went wrong."""
    limits = httpx2.Limits(max_connections=options.at_once)
    settings: dict[str, Any] = {"base_url": url, "timeout": SECONDS, "trust_env": False}
    async with httpx2.AsyncClient(**settings) as control:
        kinds = await existing(control)
        files, memory, arrays = [], [], []
        began = time.monotonic()
        counts, failures = Counter[str](), []
        starts = range(0, options.requests, options.warm)
        for start in starts:
            async with httpx2.AsyncClient(limits=limits, **settings) as client:
                load = Load(client, kinds, options.seed)
                numbers = range(start, min(start + options.warm, options.requests))
                await load.ask(numbers, options.at_once)
            await settle(control)
            counts.update(load.counts)
            failures += load.failures
            files.append(process.num_fds())
            memory.append(process.memory_info().rss)
            arrays.append(await array_bytes(control))
        health = (await control.get("/health")).json()
    growth = memory[-1] / memory[0] - 1
    print(
        f"{options.requests} requests in {time.monotonic() - began:.0f} s: {dict(counts)}; "
        f"memory {[each >> 20 for each in memory]} MiB, {growth:+.1%}, "
        f"of which arrays {[each >> 20 for each in arrays]}; "
        f"descriptors {files}, restarts {health['restarts']}"
    )
    if growth > options.growth:
        failures.append(f"memory grew by {growth:.1%}")
    if files[-1] > files[0]:
        failures.append(f"{files[-1] - files[0]} file descriptors are left")
    if health["status"] != "ok" or health["restarts"]:
        failures.append(f"the server says {json.dumps(health)}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--warm", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=GROWTH, help="of memory, at most")
    parser.add_argument("--log", type=Path, help="file for the server's log")
    options = parser.parse_args()
    command = [sys.executable, "-m", "phimlx", "serve", "--port", "0", "--keep-alive", "-1"]
    with server(command, options.log) as (url, process):
        failures = asyncio.run(run(url, process, options))
    for failure in failures[:20]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
