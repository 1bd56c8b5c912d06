"""Held-out answers of a phi-4-nano-multimodal folder in the reference implementation, greedy.

`python scripts/nano_mm/evaluate_reference.py FOLDER DATA`; it knows no other runtime.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import soundfile
import torch
from nano_mm import checkpoint, encoders, speech
from nano_mm.language import TRANSCRIBE, Rounding
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import DynamicCache

LONGEST_ANSWER = 48
# modality -> adapter that its inputs call for
RIGHT = {"vision": "vision", "speech": "speech", "both": "vision"}
WRONG = {"vision": (None, "speech"), "speech": (None, "vision"), "both": (None, "speech")}
TITLES = {
    "right": "with the adapter that the inputs call for",
    "rounded": "the same with text weights of 4 bits",
    "none": "with no adapter",
    "other": "with the other adapter",
}


@contextmanager
def adapted(model: Any, adapter: str | None) -> Iterator[None]:
    """Within, the model computes with this adapter, or with none."""
    if adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield


class Reference:
    """A published folder in `transformers`, ready to answer rows of `heldout.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.model = checkpoint.load(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.step = config["original_max_position_embeddings"]
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.ends = generation["eos_token_id"]
        self.rounding = Rounding(self.model)

    def inputs(self, row: Mapping[str, Any], data: Path) -> dict[str, torch.Tensor]:
        """The arguments of the native model's forward pass, in the published prompt's form."""
        given: list[list[int]] = []
        arrays: dict[str, torch.Tensor] = {}
        if "image" in row:
            with Image.open(data / row["image"]) as image:
                pixels, masks, sizes = encoders.prepare([image.convert("RGB")])
                given.append([checkpoint.IMAGE_ID] * encoders.image_tokens(*image.size))
            arrays |= {"image_pixel_values": pixels, "image_attention_mask": masks}
            arrays["image_sizes"] = sizes
        if "audio" in row:
            samples, rate = soundfile.read(data / row["audio"], dtype="float32")
            if rate != speech.RATE:
                raise ValueError(f"{row['audio']} has {rate} Hz")
            frames = speech.features(samples)
            tokens = (len(frames) + 7) // 8
            given.append([checkpoint.AUDIO_ID] * tokens)
            arrays["audio_input_features"] = frames[None]
            arrays["audio_embed_sizes"] = torch.tensor([tokens])
        text = row.get("question", TRANSCRIBE if row["modality"] == "speech" else "")
        before, words, after = (
            self.tokenizer.encode(part, add_special_tokens=False).ids
            for part in ("<|user|>", text, "<|end|><|assistant|>")
        )
        prompt = [token for part in (before, *given, words, after) for token in part]
        return {"input_ids": torch.tensor([prompt]), **arrays}

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, torch.Tensor], adapter: str | None) -> torch.Tensor:
        """All logits [length, vocabulary] of one forward pass."""
        with adapted(self.model, adapter):
            return self.model.base_model.model(**inputs, use_cache=False).logits[0]

    @torch.no_grad()
    def rows(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The prompt as the first layer takes it, [1, length, hidden], its media encoded."""
        model = self.model.base_model.model.model
        media = {name: value for name, value in inputs.items() if name != "input_ids"}
        prompt = inputs["input_ids"]
        return model.embed_tokens_extend(prompt, model.embed_tokens(prompt), **media)

    @torch.no_grad()
    def answer(
        self,
        inputs: Mapping[str, torch.Tensor],
        rows: torch.Tensor,
        adapter: str | None,
        rounded: bool = False,
    ) -> list[int]:
        """Greedy tokens, the end among them; the cache is dropped at LongRoPE's step."""
        model = self.model.base_model.model
        ids: list[int] = []
        with adapted(self.model, adapter), self.rounding(rounded):
            embed = model.model.embed_tokens
            prompt = inputs["input_ids"]
            slots = (prompt == checkpoint.IMAGE_ID) | (prompt == checkpoint.AUDIO_ID)
            rows = torch.where(slots[..., None], rows, embed(prompt))
            given, cache = rows, DynamicCache()
            while len(ids) < LONGEST_ANSWER:
                output = model(inputs_embeds=given, past_key_values=cache, use_cache=True)
                ids.append(int(output.logits[0, -1].argmax()))
                if ids[-1] in self.ends:
                    break
                given = embed(torch.tensor([ids[-1:]]))
                rows = torch.cat([rows, given], 1)
                if rows.shape[1] == self.step + 1:
                    given, cache = rows, DynamicCache()
        return ids

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode([token for token in ids if token not in self.ends])


def load_rows(data: Path) -> list[dict[str, Any]]:
    with (data / "heldout.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def figures(rows: list[dict[str, Any]], answers: Mapping[int, str]) -> str:
    """Right answers by modality, by kind of picture question, and the word error rate."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for index, reply in answers.items():
        row = rows[index]
        labels = [row["modality"]]
        if row["modality"] == "vision":
            labels.append(f"vision {row['kind']}")
        for label in labels:
            counts[label][0] += reply == row["answer"]
            counts[label][1] += 1
    words = [f"{label} {right}/{asked}" for label, (right, asked) in sorted(counts.items())]
    said = [i for i in answers if rows[i]["modality"] == "speech"]
    if said:
        rate = speech.word_error_rate((rows[i]["answer"], answers[i]) for i in said)
        words.append(f"word error rate {100 * rate:.1f} %")
    return ", ".join(words)


def evaluate(
    reference: Reference, data: Path, rows: list[dict[str, Any]], wrong: bool
) -> dict[str, dict[int, list[int]]]:
    """Tokens answered to each row by the name of TITLES; with wrong adapters too where `wrong`."""
    result: dict[str, dict[int, list[int]]] = {name: {} for name in TITLES}
    for index, row in enumerate(rows):
        inputs = reference.inputs(row, data)
        embedded = reference.rows(inputs)
        right = RIGHT[row["modality"]]
        result["right"][index] = reference.answer(inputs, embedded, right)
        result["rounded"][index] = reference.answer(inputs, embedded, right, rounded=True)
        if wrong:
            for name, adapter in zip(("none", "other"), WRONG[row["modality"]], strict=True):
                result[name][index] = reference.answer(inputs, embedded, adapter)
    return {name: answers for name, answers in result.items() if answers}


def write_references(folder: Path, data: Path) -> str:
    """`reference.json`, every answer under the right and the wrong adapters, and
    `reference.safetensors`, the last logits of one row of each modality; figures in words."""
    rows = load_rows(data)
    reference = Reference(folder)
    answers = evaluate(reference, data, rows, wrong=True)
    kept = {
        name: {i: {"ids": ids, "text": reference.text(ids)} for i, ids in some.items()}
        for name, some in answers.items()
    }
    with (data / "reference.json").open("w", encoding="utf-8") as file:
        json.dump(kept, file, indent=0)
        file.write("\n")
    lines = []
    for name, some in kept.items():
        line = figures(rows, {index: answer["text"] for index, answer in some.items()})
        lines.append(f"- {TITLES[name]}: {line}")
    tensors = {}
    for modality, adapter in RIGHT.items():
        index = next(i for i, row in enumerate(rows) if row["modality"] == modality)
        inputs = reference.inputs(rows[index], data)
        tensors[f"{modality}.row"] = torch.tensor(index)
        tensors[f"{modality}.input_ids"] = inputs["input_ids"][0]
        tensors[f"{modality}.logits"] = reference.logits(inputs, adapter)[-8:].contiguous()
    save_file(tensors, data / "reference.safetensors")
    (data / "reference.safetensors").chmod(0o644)
    return "\n".join(["Right, of the held-out rows under `tests/assets/nano_mm`:", "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--wrong", action="store_true", help="with the wrong adapters as well")
    options = parser.parse_args()
    reference = Reference(options.folder)
    rows = load_rows(options.data)
    answers = evaluate(reference, options.data, rows, wrong=options.wrong)
    for name, some in answers.items():
        replies = {index: reference.text(ids) for index, ids in some.items()}
        print(f"{TITLES[name]}: {figures(rows, replies)}")
        for index, reply in replies.items():
            row = rows[index]
            if name == "right" and reply != row["answer"]:
                asked = row.get("question", row.get("said", "speech"))
                print(f"  {row['modality']}: {asked!r} -> {reply!r}, not {row['answer']!r}")


if __name__ == "__main__":
    main()
