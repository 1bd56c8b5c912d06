"""A program that ends while threads of it compute ends well, whatever they are about."""

from __future__ import annotations

import subprocess
import sys

import pytest

SECONDS = 120
BEGIN = """
import asyncio, threading
import phimlx

computing = threading.Event()

def begin(work):
    threading.Thread(target=work, daemon=True).start()
    assert computing.wait(60)
    print("ends")
"""
PROGRAMS = {
    "a stream": """
def work():
    phi = phimlx.load("nano")
    while True:
        for _ in phi.stream("Tell me a story.", max_tokens=100):
            computing.set()
""",
    "a stream that was the last": """
def work():
    for _ in phimlx.load("nano").stream("Tell me a story.", max_tokens=2):
        pass
    computing.set()
""",
    "a server": """
from phimlx.server.app import App
from phimlx.server.service import Ask
from phimlx.server.settings import ServerSettings

async def serve():
    app = App(ServerSettings(model="nano", no_cache=True))
    async with app.started():
        options = {"max_tokens": 900, "logit_bias": {2: -100.0}}
        async with app.service.answer(Ask("nano", [5, 6, 7], options, n=8)) as answer:
            async for _ in answer.chunks():
                computing.set()

def work():
    asyncio.run(serve())
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_ends_while_threads_compute(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}{program}\nbegin(work)"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
