"""`phimlx chat`, `serve` and `bench` on two machines: the answers of one, and an end in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

import phimlx
from tests.everything import everything
from tests.training.folder import write_tiny
from tests.training.test_distributed import ROOT, two_free_ports

LOST = "Error: Another of the 2 machines is lost, so the run ends here"
SAID = ("Say so", "And what is 3 + 4?", "So?")
SAMPLING = {"temperature": 1.2, "top_p": 0.9, "seed": 5, "max_tokens": 12}
SECONDS = 240

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("machines") / "tiny")


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A command on two machines, as `mlx.launch` starts it, but with an end of what is piped in."""
    port, hosts = two_free_ports(), folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    command = [sys.executable, "-m", "tests.sharing.killed", "never", "0", *arguments]
    with ExitStack() as stack:
        machines = [
            stack.enter_context(
                subprocess.Popen(
                    command, cwd=ROOT, text=True,
                    env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )
            for rank in range(2)
        ]  # fmt: skip

        def end() -> None:
            for each in machines:
                each.kill()

        deadline = threading.Timer(SECONDS, end)
        deadline.start()
        try:
            yield machines
        finally:
            deadline.cancel()
            end()


def ended(machines: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """How each ends: its exit code, and what it says on stdout and stderr."""
    said = [each.communicate() for each in machines]
    return [(each.returncode, *own) for each, own in zip(machines, said, strict=True)]


def chat(model: Path) -> list[str]:
    flags = ("--temp=1.2", "--top-p=0.9", "--seed=5", "--max-tokens=12")
    return ["chat", "--model", str(model), "--private", "--no-cache", *flags]


def test_a_chat_says_what_one_process_says(model: Path, tmp_path: Path) -> None:
    lines = "".join(f"{line}\n" for line in SAID)
    alone = subprocess.run(
        [sys.executable, "-m", "tests.sharing.killed", "never", "0", *chat(model)],
        cwd=ROOT, input=lines, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    with started(tmp_path, *chat(model)) as machines:
        assert machines[0].stdin is not None
        machines[0].stdin.write(f"{lines}/exit\n")
        machines[0].stdin.flush()
        (code, said, notes), follower = ended(machines)
    assert alone.returncode == 0, alone.stderr
    assert (code, said) == (0, alone.stdout)
    assert "/exit ends the chat" in notes
    assert follower == (0, "", "")


def serve(model: Path) -> list[str]:
    return ["serve", "--model", str(model), "--port", "0", "--json"]


def url_of(machines: Sequence[subprocess.Popen[str]]) -> str:
    """Where the first one serves, once it does."""
    said, stdout = "", machines[0].stdout
    assert stdout is not None
    while not said.endswith("}\n"):
        line = stdout.readline()
        assert line, machines[0].stderr and machines[0].stderr.read()
        said += line
    url: str = json.loads(said)["url"]
    return url


def ask(url: str, text: str, **options: Any) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **options}
    answer = httpx2.post(f"{url}/chat/completions", json=body, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def test_a_server_answers_as_one_process_and_ends_with_a_machine(
    model: Path, tmp_path: Path
) -> None:
    options: list[dict[str, Any]] = [SAMPLING, {"temperature": 0, "max_tokens": 20}, SAMPLING]
    phi = phimlx.load(model)
    wanted = [phi.generate(text, **own).text for text, own in zip(SAID, options, strict=True)]
    with started(tmp_path, *serve(model)) as machines:
        url = url_of(machines)
        with ThreadPoolExecutor() as threads:  # which share passes
            asked = [
                threads.submit(ask, url, text, **own)
                for text, own in zip(SAID, options, strict=True)
            ]
        assert [each.result() for each in asked] == wanted
        assert ask(url, SAID[1], **options[1]) == wanted[1]  # going on from what is kept
        machines[1].kill()  # while nobody asks
        (code, _, notes), _ = ended(machines)
    assert code == 1
    assert notes.count("Error:") == 1
    assert LOST in notes
    assert "Hint: See that all of them run, then start the same command again." in notes


@everything
def test_a_server_that_is_told_to_stop_lets_the_other_go(model: Path, tmp_path: Path) -> None:
    with started(tmp_path, *serve(model)) as machines:
        assert ask(url_of(machines), SAID[0], max_tokens=3)
        machines[0].send_signal(signal.SIGTERM)
        first, other = ended(machines)
    assert (first[0], other[0]) == (0, 0)
    assert "Error:" not in first[2] + other[2]


@everything
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_dies_while_nobody_speaks_ends_a_chat(
    model: Path, tmp_path: Path, rank: int
) -> None:
    with started(tmp_path, *chat(model)) as machines:
        stdin, stdout = machines[0].stdin, machines[0].stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{SAID[0]}\n")
        stdin.flush()
        assert stdout.readline()
        machines[rank].kill()
        machines[rank].wait()
        if rank == 1:
            stdin.write(f"{SAID[1]}\n")  # which tells, at the latest
            stdin.flush()
        code, _, notes = ended([machines[1 - rank]])[0]
    assert code == 1
    assert notes.count(LOST) == 1


@everything
def test_bench_measures_both_machines(model: Path, tmp_path: Path) -> None:
    flags = ("--context", "64", "--batch-size", "2", "--tokens", "4", "--runs", "1", "--json")
    with started(tmp_path, "bench", "--model", str(model), *flags) as machines:
        (code, said, _), follower = ended(machines)
    found = json.loads(said)
    assert (code, follower) == (0, (0, "", ""))
    assert (found["machines"], found["complete"]) == (2, True)
    assert found["contexts"][0]["decode"] > 0
    assert [each["rows"] for each in found["rows"]] == [2]
