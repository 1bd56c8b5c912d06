#!/usr/bin/env python3
"""What real clients make of `phimlx serve`: a table of tools and what was tried with each.

    python scripts/server_clients.py --tools DIR

Each tool is run by a program of scripts/clients, in a process of its own, against a server that is
started for it. Tools are looked for in the Python that runs this, then in DIR: in its Python
environments (DIR/NAME/bin/python), and in DIR/node_modules. What is missing is told with how to
install it; nothing is installed here. Fails where a tool does what it should not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "scripts" / "clients"
ASSETS = ROOT / "phimlx" / "assets"
SECONDS = 900  # for all that is tried with a tool
START_SECONDS = 120
LONG_CONTEXT = 131072
LATER_LAYER = re.compile(r"\.layers\.[1-9]")
SERVING = re.compile(r"Serving at (http://[^/]+)/")


@dataclass(frozen=True)
class Tool:
    """A tool, and how it is had.

    Attributes:
        name: for people.
        program: of scripts/clients.
        needs: the module, the package of npm, or the command that it is.
        install: what to ask pip or npm for.
    """

    name: str
    program: str
    needs: str
    install: str


TOOLS = (
    Tool("openai (Python)", "openai_python.py", "openai", "pip openai"),
    Tool("anthropic (Python)", "anthropic_python.py", "anthropic", "pip anthropic"),
    Tool("ollama (Python)", "ollama_python.py", "ollama", "pip ollama"),
    Tool("LiteLLM", "litellm_python.py", "litellm", "pip litellm"),
    Tool(
        "LangChain",
        "langchain_python.py",
        "langchain_ollama",
        "pip langchain-openai langchain-anthropic langchain-ollama",
    ),
    Tool(
        "LlamaIndex",
        "llama_index_python.py",
        "llama_index",
        "pip llama-index-llms-openai-like llama-index-llms-ollama, apart from LiteLLM",
    ),
    Tool("instructor", "instructor_python.py", "instructor", "pip instructor anthropic"),
    Tool("Pydantic AI", "pydantic_ai_python.py", "pydantic_ai", "pip pydantic-ai-slim[openai]"),
    Tool("OpenAI agents", "agents_python.py", "agents", "pip openai-agents"),
    Tool("openai (JavaScript)", "openai_node.mjs", "openai", "npm openai"),
    Tool(
        "anthropic (JavaScript)", "anthropic_node.mjs", "@anthropic-ai/sdk", "npm @anthropic-ai/sdk"
    ),
    Tool("ollama (JavaScript)", "ollama_node.mjs", "ollama", "npm ollama"),
    Tool(
        "AI SDK", "ai_sdk_node.mjs", "@ai-sdk/openai-compatible", "npm ai @ai-sdk/openai-compatible"
    ),
    Tool("llm", "llm_cli.py", "llm", "pip llm llm-ollama"),
    Tool("aider", "aider_cli.py", "aider", "uv pip aider-chat, for Python 3.12 at most"),
    Tool("Continue", "continue_cli.py", "cn", "npm @continuedev/cli"),
    Tool("Cline", "cline_cli.py", "cline", "npm cline"),
    Tool("Codex", "codex_cli.py", "codex", "npm @openai/codex"),
    Tool("Claude Code", "claude_code_cli.py", "claude", "npm @anthropic-ai/claude-code"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tools", type=Path, default=None, metavar="DIR", help="where tools are")
    names = [tool.name for tool in TOOLS]
    parser.add_argument(
        "--only", nargs="+", default=names, choices=names, metavar="NAME", help="tools to try"
    )
    chosen = parser.parse_args()
    folder = None if chosen.tools is None else chosen.tools.resolve()
    attempts, failed, absent = 0, 0, 0
    print("| tool | tried | |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as made, served() as url, served(lengthened(made)) as long:
        where = {"PHIMLX_URL": url, "PHIMLX_LONG_URL": long, "PHIMLX_TOOLS": str(folder)}
        for tool in TOOLS:
            if tool.name not in chosen.only:
                continue
            command = find(tool, folder)
            if command is None:
                absent += 1
                print(f"| {tool.name} | | not here: {tool.install} |", flush=True)
                continue
            for what, why in tried(tool, command, where):
                attempts += 1
                failed += bool(why)
                print(f"| {tool.name} | {what} | {why or 'ok'} |", flush=True)
    tools = len(chosen.only) - absent
    print(f"\n{attempts} attempts with {tools} tools: {failed} failed; {absent} tools not here.")
    sys.exit(failed > 0)


def lengthened(folder: str) -> Path:
    """Make of nano's first layer a model that takes long prompts, which agents have.

    Its replies mean nothing; it reads such a prompt on a few cores before an agent gives up.
    """
    import mlx.core as mx

    copy = Path(folder) / "nano-long"
    shutil.copytree(ASSETS / "nano", copy)
    weights = copy / "model.safetensors"
    tensors: Any = mx.load(str(weights))
    first = {name: each for name, each in tensors.items() if not LATER_LAYER.search(name)}
    mx.save_safetensors(str(weights), first, {"format": "mlx"})
    config = copy / "config.json"
    changed = {"max_position_embeddings": LONG_CONTEXT, "num_hidden_layers": 1}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    return copy


@contextmanager
def served(model: Path | None = None) -> Iterator[str]:
    """Run a server for the block; yields its URL."""
    only = [] if model is None else ["--model", str(model), "--max-tokens", "60"]
    server = subprocess.Popen(
        [sys.executable, "-m", "phimlx", "serve", "--port", "0", *only],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    timer = threading.Timer(START_SECONDS, server.kill)
    timer.start()
    try:
        said = ""
        assert server.stdout is not None
        for line in server.stdout:
            said += line
            if found := SERVING.search(line):
                break
        else:
            sys.exit(f"The server did not start:\n{said}")
        timer.cancel()
        threading.Thread(target=server.stdout.read, daemon=True).start()  # else the pipe fills
        yield found[1]
        if server.poll() is not None:
            sys.exit(f"The server ended by itself, with {server.returncode}.")
    finally:
        timer.cancel()
        server.terminate()
        server.wait(60)


def find(tool: Tool, folder: Path | None) -> dict[str, list[str]] | None:
    """Find how a tool is run: the command, and the path of the tool where it is a command."""
    pythons = [sys.executable]
    if folder is not None:
        pythons += [str(each) for each in sorted(folder.glob("*/bin/python"))]
    if tool.program.endswith("_python.py"):
        look = f"import importlib.util as u, sys; sys.exit(u.find_spec({tool.needs!r}) is None)"
        for python in pythons:
            if subprocess.run([python, "-c", look], check=False).returncode == 0:
                return {"run": [python], "tool": []}
        return None
    modules = None if folder is None else folder / "node_modules"
    if tool.program.endswith(".mjs"):
        node = shutil.which("node")
        here = node is not None and modules is not None and (modules / tool.needs).is_dir()
        return {"run": [str(node)], "tool": []} if here else None
    places = [str(Path(python).parent) for python in pythons]
    places += [] if modules is None else [str(modules / ".bin")]
    program = shutil.which(tool.needs, path=os.pathsep.join(places)) or shutil.which(tool.needs)
    return None if program is None else {"run": [sys.executable], "tool": [program]}


def tried(
    tool: Tool, command: dict[str, list[str]], where: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Run a tool's program; yields what was tried and why it failed, empty where it did not."""
    environment = {
        **os.environ,
        **where,
        "PHIMLX_ASSETS": str(ASSETS / "nano-multimodal"),
        "PHIMLX_PROGRAM": "".join(command["tool"]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    started = subprocess.Popen(
        [*command["run"], str(PROGRAMS / tool.program)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROGRAMS,
    )
    try:
        out, problem = started.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        started.kill()
        out, problem = started.communicate()
        problem = f"it took more than {SECONDS} s"
    results = [json.loads(line) for line in out.splitlines() if line.startswith('{"what"')]
    for each in results:
        yield each["what"], clipped(each["why"])
    if started.returncode != 0 or not results:
        yield "all of it", clipped(problem) or f"ended with {started.returncode}"


def clipped(text: str) -> str:
    """Make text fit a cell of the table."""
    return re.sub(r"\s+", " ", text).replace("|", "/")[-300:]


if __name__ == "__main__":
    main()
