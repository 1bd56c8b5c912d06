"""Data of a task that nano does not know: `python scripts/nano/new_task.py OUT`.

A made-up name and a number are to be written as a label: "Label Tavoni with 42." -> "[42|Tavoni]".
Names and numbers of the test rows occur in no other row. Writes train.jsonl, valid.jsonl and
test.jsonl, for `phimlx train --data OUT` and `phimlx evaluate --data OUT`.
"""

import argparse
import json
import random
from itertools import product
from pathlib import Path

FIRST = ("Ba", "Du", "Ka", "Lo", "Mi", "No", "Pe", "Ru", "Sa", "Ti", "Va", "Zo")
MIDDLE = ("ri", "lo", "ne", "ta", "vo", "du", "mi", "sa")
LAST = ("n", "ra", "ni", "s", "la", "to", "mo", "k")
FORMS = ("Label {name} with {number}.", "Put {number} on {name}.", "Tag {name}: {number}")
SIZES = {"train": 1200, "valid": 60, "test": 100}


def row(rng: random.Random, name: str, number: int) -> dict[str, str]:
    """A question with its answer."""
    prompt = rng.choice(FORMS).format(name=name, number=number)
    return {"prompt": prompt, "completion": f"[{number}|{name}]"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    names = ["".join(parts) for parts in product(FIRST, MIDDLE, LAST)]
    numbers = list(range(10, 100))
    rng.shuffle(names)
    rng.shuffle(numbers)
    held = {"test": (names[:160], numbers[:12])}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        of_split = held.get(split, (names[160:], numbers[12:]))
        rows = [row(rng, rng.choice(of_split[0]), rng.choice(of_split[1])) for _ in range(size)]
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (arguments.out / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
