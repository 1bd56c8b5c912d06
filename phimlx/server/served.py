"""What may be asked for by name: the models of this machine, and adapters of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from phimlx import catalog
from phimlx.adapters.variants import NAME
from phimlx.checkpoint.folder import Checkpoint
from phimlx.errors import ConfigError, SettingsError, shortened
from phimlx.files import read_json
from phimlx.hub.cache import list_models
from phimlx.hub.layout import model_name
from phimlx.hub.model_files import ADAPTER_CONFIG
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL, resolve, resolve_adapter
from phimlx.machine.memory import Footprint, footprint
from phimlx.models.registry import of_config
from phimlx.preferences.file import read_alias
from phimlx.server.settings import ServerSettings

SHARE = 8192  # tokens whose keys and values a forecast counts

_GIVEN = re.compile(r"(?:(?P<model>[^=]+):)?(?P<label>[^:=]*)=(?P<source>.+)")


@dataclass(frozen=True)
class Served:
    """A model that may be asked for, or one with an adapter.

    Attributes:
        name: as the server calls it: an alias of the catalogue, a Hub id, or a folder's name; with
            an adapter, that of the model, a colon and the label.
        folder: where the model lies.
        other_names: that mean it too.
        base: the model without the adapter; None where there is none.
        adapter: where the adapter lies.
        label: by which name the model knows it.
    """

    name: str
    folder: Path
    other_names: tuple[str, ...] = ()
    base: Served | None = None
    adapter: Path | None = None
    label: str = ""

    @classmethod
    def of(cls, folder: Path, name: str | None = None) -> Served:
        known = catalog.find(name or model_name(folder))
        if known is None:
            return cls(name or folder.resolve().name, folder)
        return cls(known.alias, folder, known.names)

    def with_adapter(self, label: str, folder: Path, *names: str) -> Served:
        """Name the model with an adapter; `names` mean it too."""
        others = (*(f"{name}:{label}" for name in self.other_names), *names)
        return Served(f"{self.name}:{label}", self.folder, others, self, folder, label)

    def is_called(self, name: str) -> bool:
        """Whether a name means it, in letters of either case."""
        return name.lower() in {other.lower() for other in (self.name, *self.other_names)}

    @property
    def created(self) -> int:
        """When its config came here, in seconds since 1970."""
        config = "config.json" if self.adapter is None else ADAPTER_CONFIG
        return int(((self.adapter or self.folder) / config).stat().st_mtime)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return read_json(self.folder / "config.json")

    @property
    def context_length(self) -> int:
        """Tokens that prompt and reply may have together."""
        return int(self.config.get("max_position_embeddings", 0))

    @cached_property
    def nbytes(self) -> int:
        """Size of its weights on disk; of the adapter's alone where there is one."""
        files = (self.adapter or self.folder).glob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    @cached_property
    def forecast(self) -> Footprint:
        """What it is to take in memory, with some thousand tokens of context.

        Raises:
            ConfigError, CheckpointError: where it is no whole model.
        """
        if self.adapter is not None:
            return Footprint(0, self.nbytes, 0, 0)
        config = Checkpoint(self.folder).config
        shape = of_config(config).read_config(config)
        return footprint(shape, self.nbytes, min(SHARE, self.context_length))


def list_served(settings: ServerSettings) -> list[Served]:
    """List what may be asked for: the model of the settings, or all on this machine; and adapters.

    Where the settings name a model by a name of the user's own, that name means its adapter too.

    Raises:
        ModelNotFoundError, CheckpointError: where that one is none, or an adapter is none.
        ConfigError: where phimlx does not run it.
        SettingsError: for an adapter that is not named right, or a model that is not served.
    """
    cached = [(each, each.snapshot) for each in list_models() if each.snapshot is not None]
    cached_adapters = [(each.repository, folder) for each, folder in cached if each.is_adapter]
    if settings.model is not None:
        name = settings.model if catalog.find(settings.model) else None
        models = [Served.of(resolve(settings.model), name)]
        of_config(models[0].config)
    else:
        models = [Served.of(NANO, "nano"), Served.of(NANO_MULTIMODAL, "nano-multimodal")]
        models += [
            Served.of(folder, each.repository) for each, folder in cached if not each.is_adapter
        ]
    found = {model.name: model for model in models}
    own = read_alias(settings.model) if settings.model is not None else {}
    if settings.model is not None and "adapter" in own:
        label = settings.model if NAME.fullmatch(settings.model) else "own"
        folder = resolve_adapter(own["adapter"])
        whole = models[0].with_adapter(label, folder, settings.model)
        found[whole.name] = whole
    for given in settings.adapters:
        adapter = _read_given(given, models)
        if adapter.name in found:
            raise SettingsError(
                f"--adapter {shortened(given)}: there is a {adapter.name} already.",
                hint="Choose another name.",
            )
        found[adapter.name] = adapter
    for repository, folder in cached_adapters:
        owner, _, label = repository.rpartition("/")
        for base in _bases(folder, models):
            named = [
                base.with_adapter(each[:64], folder, repository)
                for each in (label, f"{owner}.{label}")
            ]
            free = [adapter for adapter in named if adapter.name not in found]
            found.update({adapter.name: adapter for adapter in free[:1]})
    return list(found.values())


def _read_given(given: str, models: Sequence[Served]) -> Served:
    """Read what was given as NAME=ADAPTER or MODEL:NAME=ADAPTER."""
    parts = _GIVEN.fullmatch(given)
    if parts is None or not NAME.fullmatch(parts["label"]):
        raise SettingsError(
            f"--adapter {shortened(given)} names no adapter.",
            hint="Give NAME=FOLDER, or MODEL:NAME=FOLDER, with a name of letters, digits, dots, "
            "dashes and underscores.",
        )
    folder = resolve_adapter(parts["source"])
    named = parts["model"]
    if named is None:
        bases = models[:1] if len(models) == 1 else _bases(folder, models)
    else:
        bases = [model for model in models if model.is_called(named)]
    if not bases:
        here = ", ".join(model.name for model in models)
        what = "does not say which model it is for" if named is None else "is for no model here"
        raise SettingsError(
            f"--adapter {shortened(given)} {what}.",
            hint=f"Give MODEL:NAME=FOLDER with one of {here}.",
        )
    return bases[0].with_adapter(parts["label"], folder)


def _bases(adapter: Path, models: Sequence[Served]) -> list[Served]:
    """Find the models that an adapter's config names."""
    config: dict[str, Any] = {}
    with suppress(ConfigError):
        config = read_json(adapter / ADAPTER_CONFIG, missing_ok=True)
    named = config.get("base_model_name_or_path", config.get("model"))
    if not isinstance(named, str):
        return []
    known = catalog.find(named)
    name = named if known is None else known.alias
    return [model for model in models if model.is_called(name) or str(model.folder) == named]
