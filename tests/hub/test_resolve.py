"""Which folder a name means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from phimlx import catalog
from phimlx.cli.group import cli
from phimlx.errors import CheckpointError, DownloadError, ModelAbsentError, ModelNotFoundError
from phimlx.hub import resolve
from tests.hub.cached import ORIGINAL, OTHER_COMMIT, QUANTIZED, keep, use_empty_cache
from tests.locked_out import locked_out, open_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_empty_cache(tmp_path, monkeypatch)


KNOWN = f"Known are {', '.join(model.alias for model in catalog.FAMILY)}."


def resolving(source: str | Path | None, **options: bool) -> ModelNotFoundError:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve.resolve(source, **options)
    return caught.value


def test_nano_comes_along() -> None:
    assert resolve.resolve("nano") == resolve.resolve("phi-4-NANO") == resolve.NANO
    assert (resolve.NANO / "config.json").is_file()
    assert (
        resolve.resolve("nano-multimodal") == resolve.resolve("nano-mm") == resolve.NANO_MULTIMODAL
    )


@pytest.mark.parametrize("source", [None, "phi-4-mini", "PHI-4-mini-instruct"])
def test_an_alias_prefers_the_quantized_model(cache: Path, source: str | None) -> None:
    original = keep(cache, ORIGINAL)
    assert resolve.resolve(source) == original
    quantized = keep(cache, QUANTIZED)
    assert resolve.resolve(source) == quantized
    if source is not None:
        assert resolve.resolve(source, original=True) == original


def test_a_hub_id_means_itself(cache: Path) -> None:
    original, quantized = keep(cache, ORIGINAL), keep(cache, QUANTIZED)
    assert resolve.resolve(ORIGINAL) == resolve.resolve(ORIGINAL.upper()) == original
    assert resolve.resolve(QUANTIZED) == quantized
    tune = keep(cache, "someone/My-Phi-4")
    assert resolve.resolve("someone/My-Phi-4") == tune


def test_the_main_branch_comes_first_then_the_newest(cache: Path) -> None:
    pinned = keep(cache, QUANTIZED, OTHER_COMMIT, main=False)
    assert resolve.resolve("phi-4-mini") == pinned
    main = keep(cache, QUANTIZED)
    os.utime(main, (1, 1))
    assert resolve.resolve("phi-4-mini") == main
    (main / "model.safetensors").unlink()
    assert resolve.resolve("phi-4-mini") == pinned


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})

BOTH = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
STALE = [
    INDEX,
    "{",
    "[]",
    *(json.dumps({"weight_map": weight_map}) for weight_map in (3, {"a": 3}, {})),
]


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": ""},
        {"tokenizer.json": ""},
        {"model.safetensors": ""},
        {"model.safetensors": "", "model-1.safetensors": "x"},
        *(
            {"model.safetensors": "", "model.safetensors.index.json": index, **files}
            for index in STALE
            for files in ({}, {"model-1.safetensors": "x"})
        ),
        {"model.safetensors.index.json": BOTH},
    ],
)
def test_half_a_model_does_not_count(cache: Path, files: dict[str, str]) -> None:
    keep(cache, QUANTIZED, **files)
    assert str(resolving("phi-4-mini")) == "phi-4-mini is not on this machine."


@pytest.mark.parametrize("index", STALE)
def test_a_whole_model_counts_beside_a_stale_index(cache: Path, index: str) -> None:
    folder = keep(cache, QUANTIZED, **{"model.safetensors.index.json": index})
    assert resolve.resolve(QUANTIZED) == folder


def test_a_sharded_model_counts_when_all_of_it_is_there(cache: Path) -> None:
    folder = keep(
        cache,
        QUANTIZED,
        **{
            "model.safetensors": "",
            "model.safetensors.index.json": INDEX,
            "model-1.safetensors": "x",
            "model-2.safetensors": "x",
        },
    )
    assert resolve.resolve(QUANTIZED) == folder


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "phi-4", "someone/tune"):
        Path(name).mkdir(parents=True)
    for source in ("mine", "./mine", "mine/", "../work/mine", str(Path("mine").absolute())):
        assert resolve.resolve(source) == Path(source)
    assert resolve.resolve("someone/tune") == Path("someone/tune")
    assert resolve.resolve(Path("phi-4")) == Path("phi-4")
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    assert resolve.resolve("~/mine") == tmp_path / "work" / "mine"


def test_a_folder_named_as_an_alias_counts_where_it_holds_a_model(cache: Path) -> None:
    snapshot = keep(cache, "microsoft/phi-4")
    Path("phi-4").mkdir()
    assert resolve.resolve("phi-4") == snapshot
    Path("phi-4/config.json").write_text("{}")
    assert resolve.resolve("phi-4") == Path("phi-4")
    assert resolve.resolve("./phi-4") == Path("phi-4")


def test_what_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder() as folder:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        snapshot = keep(folder / "hub", "someone/tune")
        assert resolve.resolve("someone/tune") == snapshot
        for locked in (snapshot, snapshot.parent, snapshot.parents[1], folder / "hub"):
            with locked_out(locked), pytest.raises(DownloadError) as caught:
                resolve.resolve("someone/tune")
            assert str(caught.value).startswith(f"{locked}")
            assert str(caught.value).endswith(" cannot be read: permission denied.")
            assert caught.value.hint == "Make it yours to read, or set HF_HOME to another folder."
        monkeypatch.chdir(folder)
        Path("phi-4").mkdir()
        for source in ("phi-4", "phi-4/mine", "./phi-4/mine"):
            with locked_out(Path("phi-4")), pytest.raises(CheckpointError) as refused:
                resolve.resolve(source)
            assert str(refused.value).startswith("phi-4/")
            assert str(refused.value).endswith(" cannot be read: permission denied.")


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        (
            None,
            "phi-4-mini, the default model, is not on this machine.",
            "Get it with: phimlx download phi-4-mini, or try the small model that comes along "
            "right now: --model nano",
        ),
        (
            "phi-4-reasoning",
            "phi-4-reasoning is not on this machine.",
            "Get it with: phimlx download phi-4-reasoning",
        ),
        (
            "someone/tune",
            "someone/tune is not on this machine.",
            "If it is a Phi model, get it with: phimlx download someone/tune",
        ),
        (
            "phi4-minni",
            "phi4-minni is neither a folder, an alias nor a Hub id.",
            "Did you mean phi-4-mini?",
        ),
        (
            "Phi-4-reasoning-pluss",
            "Phi-4-reasoning-pluss is neither a folder, an alias nor a Hub id.",
            "Did you mean phi-4-reasoning-plus?",
        ),
        (
            "llama",
            "llama is neither a folder, an alias nor a Hub id.",
            KNOWN,
        ),
        (
            "a--b/c",
            "a--b/c is neither a folder nor a Hub id, which has the form owner/name.",
            KNOWN,
        ),
        (
            "microsoft/phi 4",
            "microsoft/phi 4 is neither a folder nor a Hub id, which has the form owner/name.",
            "Did you mean phi-4?",
        ),
        (
            "",
            "The model's name is empty.",
            KNOWN,
        ),
        *(
            (
                path,
                f"{path} is no folder on this machine.",
                "Give a model's folder, or an alias such as phi-4-mini.",
            )
            for path in ("./x", "../x", "/none/x", "~no-such-user/x", "x/", "a/b/c", "a\0/")
        ),
        (
            Path("phi-4"),
            "phi-4 is no folder on this machine.",
            "Give a model's folder, or an alias such as phi-4-mini.",
        ),
    ],
)
def test_what_is_not_here(source: str | Path | None, message: str, hint: str) -> None:
    error = resolving(source)
    assert str(error) == message
    assert error.hint == hint


def test_the_original_of_an_alias_is_not_here(cache: Path) -> None:
    keep(cache, QUANTIZED)
    error = resolving("phi-4-mini", original=True)
    assert str(error) == f"{ORIGINAL} is not on this machine."
    assert error.hint == f"Get it with: phimlx download {ORIGINAL}"


def test_a_file_is_no_folder() -> None:
    Path("model.gguf").touch()
    assert str(resolving("./model.gguf")) == (
        "./model.gguf is a GGUF file, which phimlx runs when it is converted."
    )


def test_folders_and_nano_need_no_huggingface_hub(tmp_path: Path) -> None:
    code = (
        "import sys; from phimlx.hub.resolve import resolve; resolve('nano'); resolve(sys.argv[1])"
        "; print('huggingface_hub' in sys.modules, 'mlx' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout == "False False\n"


GGUF = "is a GGUF file, which phimlx runs when it is converted."
CONVERT = "Convert it with: phimlx convert {} --mlx-path OUT -q"
WHOLE_MODEL = (
    "Give the folder of the original model, with config.json and model.safetensors, or an alias "
    "such as phi-4-mini."
)
FOLDER = "Give a model's folder, or an alias such as phi-4-mini."
PYTORCH = "is a PyTorch file, and only safetensors weights are read."
WEIGHTS = "is a weight file, not a model's folder."


@pytest.mark.parametrize("place", ["{}", "files/{}", "./files/{}", "a/b/{}", "{root}/files/{}"])
@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("phi.gguf", b"GGUF\3\0", GGUF, CONVERT),
        ("phi.GGUF", b"", GGUF, CONVERT),
        ("phi-q4", b"GGUF\3\0", GGUF, CONVERT),
        ("model.safetensors", b"", WEIGHTS, FOLDER),
        ("pytorch_model.bin", b"PK", PYTORCH, WHOLE_MODEL),
        ("model.pth", b"PK", PYTORCH, WHOLE_MODEL),
        ("notes.txt", b"", "is a file, not a folder.", FOLDER),
    ],
)
def test_a_file_is_told_what_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    name: str,
    content: bytes,
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = place.format(name, root=tmp_path)
    Path(given).parent.mkdir(parents=True, exist_ok=True)
    Path(given).write_bytes(content)
    for source in (given, Path(given)):
        error = resolving(source)
        assert not isinstance(error, ModelAbsentError)
        assert (str(error), error.hint) == (f"{source} {message}", hint.format(source))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_a_model_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/mini").mkdir(parents=True)
    for each in ("config.json", "model.safetensors", "tokenizer.json"):
        Path(f"models/mini/{each}").touch()
    assert resolving(f"models/mini/{name}").hint == "Give its folder: models/mini"


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_model.safetensors"])
def test_an_adapters_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tuned").mkdir()
    Path(f"tuned/{name}").touch()
    error = resolving(f"tuned/{name}")
    assert str(error) == f"tuned/{name} is an adapter's file."
    assert error.hint == "Give its folder: --adapter-path tuned"


@pytest.mark.parametrize("name", ["files/phi.gguf", "phi.gguf", "files/model.safetensors"])
def test_a_file_that_is_not_there_is_no_model_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = resolving(name)
    assert not isinstance(error, ModelAbsentError)
    assert str(error) == f"There is no file {name}, and no model of that name."


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "hi", "--model", "files/phi.gguf"],
        ["train", "--data", "data", "--adapter-path", "run", "--model", "files/phi.gguf"],
    ],
)
def test_commands_tell_what_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("files").mkdir()
    Path("files/phi.gguf").write_bytes(b"GGUF")
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1
    assert f"files/phi.gguf {GGUF}" in result.stderr


@pytest.mark.parametrize("command", [["show"], ["convert", "--mlx-path", "out"]])
def test_commands_that_read_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("phi.gguf").write_bytes(b"GGUF")
    result = CliRunner().invoke(cli, [*command, "phi.gguf"])
    assert result.exit_code == 1
    assert "phi.gguf is not a whole GGUF file: it ends within its header." in result.stderr


def test_gguf_files_by_their_names_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("phi.gguf").touch()
    Path("blob").write_bytes(b"GGUF\3\0")
    Path("notes.txt").write_text("GG")
    Path("alone").mkdir()
    Path("alone/a.GGUF").touch()
    Path("nano").mkdir()
    Path("nano/a.gguf").touch()
    for name, found in {
        "phi.gguf": "phi.gguf",
        "./blob": "blob",
        "blob": "blob",
        "alone": "alone/a.GGUF",
        "alone/": "alone/a.GGUF",
        "./nano": "nano/a.gguf",
        "nano": None,  # an alias
        "notes.txt": None,
        "microsoft/phi-4": None,
        "phi-4": None,
        "none.gguf": None,
        "": None,
    }.items():
        assert resolve.find_local_gguf(name) == (None if found is None else Path(found)), name
