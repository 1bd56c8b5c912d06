"""Tokens a pass that prompt lookup decoding gives on real texts, and what that is worth.

`python scripts/bench/lookup.py [--text FOLDER] [--tokenizer MODEL] [--files N]`

The model's choice at each place is the true next token, so that only drafts and their lengths are
measured. Texts: files of this repository before and after a commit, as a rewrite of the whole file
and as a diff; files as they were first written; prose of the data folder. The gain is that over
plain decoding under the published cost of a pass (`phimlx.machine.pass_cost.PUBLISHED`); a pass
that waits for its draft is counted dearer by WAIT.
"""

import argparse
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from phimlx.generation.speculation import PromptLookup
from phimlx.hub.resolve import resolve
from phimlx.machine.pass_cost import PUBLISHED
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WAIT = 0.03  # of a pass: the chip idles while a draft is looked up and the next pass is laid out
LONGEST = 6000  # tokens of a text


def replay(prompt: list[int], reply: list[int]) -> tuple[int, float, float]:
    """Passes, their cost in passes over one token, and seconds of drafting for each token."""
    lookup = PromptLookup(prompt, PUBLISHED.cost)
    passes, cost, done = 0, 0.0, 0
    began, pending = time.perf_counter(), reply[:1]  # the prompt's own pass gives the first token
    done = 1
    while done < len(reply):
        waits = bool(lookup.draft())
        lookup.extend(pending)
        draft = lookup.draft(len(reply) - done - 1) if waits else []
        accepted = 0
        while accepted < len(draft) and draft[accepted] == reply[done + accepted]:
            accepted += 1
        pending = reply[done : done + accepted + 1]
        done += len(pending)
        passes += 1
        cost += PUBLISHED.cost(1 + len(draft)) + WAIT * waits
    return passes, cost, (time.perf_counter() - began) / len(reply)


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True, errors="replace"
    ).stdout


def edits(count: int) -> Iterator[tuple[str, str, str, str]]:
    """Python files that commits of this repository changed: before, after, diff and message."""
    rng = random.Random("edits")
    commits = git("log", "--no-merges", "--format=%H", "--diff-filter=M").split()
    rng.shuffle(commits)
    for commit in commits:
        names = git("diff", "--name-only", "--diff-filter=M", f"{commit}~", commit).split("\n")
        names = [name for name in names if name.endswith(".py")]
        if not names:
            continue
        name = rng.choice(names)
        before, after = git("show", f"{commit}~:{name}"), git("show", f"{commit}:{name}")
        diff = git("diff", f"{commit}~", commit, "--", name)
        yield before, after, diff, git("log", "-1", "--format=%B", commit)
        count -= 1
        if not count:
            return


def fresh(count: int) -> Iterator[str]:
    """Python files of this repository as they are."""
    names = [name for name in git("ls-files", "*.py").split("\n") if name]
    for name in random.Random("fresh").sample(names, min(count, len(names))):
        yield (ROOT / name).read_text(encoding="utf-8")


def prose(folder: Path, count: int) -> Iterator[str]:
    """Pieces of the texts of a folder."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.txt")]
    rng = random.Random("prose")
    for _ in range(count if texts else 0):
        text = rng.choice(texts)
        begin = rng.randrange(max(1, len(text) - 8000))
        yield text[begin : begin + 8000]


def cases(folder: Path | None, count: int) -> Iterator[tuple[str, str, str]]:
    """Kind, prompt and reply."""
    for before, after, diff, message in edits(count):
        asked = f"{message}\n\n{before}\n\n"
        yield "whole-file rewrite", asked, after
        yield "diff", asked, diff
    for text in fresh(count):
        yield "fresh code", text[:400], text[400:]
    for text in prose(folder, count) if folder else ():
        yield "fresh prose", text[:400], text[400:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="folder with prose, *.txt")
    parser.add_argument("--tokenizer", default="nano", help="model or folder whose it is")
    parser.add_argument("--files", type=int, default=40, help="of each kind")
    options = parser.parse_args()
    folder = Path(options.tokenizer)
    tokenizer = Tokenizer.load(folder if folder.is_dir() else resolve(options.tokenizer))
    rows: dict[str, list[tuple[int, int, float, float]]] = {}
    for kind, asked, answer in cases(options.text, options.files):
        prompt, reply = tokenizer.encode(asked)[-LONGEST:], tokenizer.encode(answer)[:LONGEST]
        if len(prompt) and len(reply) > 20:
            rows.setdefault(kind, []).append((len(reply), *replay(prompt, reply)))
    print(f"{'':20}{'texts':>6}{'tokens a pass':>15}{'gain':>8}{'worst':>8}{'ms a token':>12}")
    for kind, found in rows.items():
        tokens = sum(row[0] for row in found)
        passes, cost = sum(row[1] for row in found), sum(row[2] for row in found)
        worst = min(row[0] / row[2] for row in found)
        spent = 1000 * median(row[3] for row in found)
        print(
            f"{kind:20}{len(found):6}{tokens / passes:15.2f}{tokens / cost:7.2f}x{worst:7.2f}x"
            f"{spent:12.3f}"
        )


if __name__ == "__main__":
    main()
