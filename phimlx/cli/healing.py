"""What `phimlx prune --heal` does: the whole model is distilled into what pruning left of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.training.distill.settings import DistillSettings


@dataclass(frozen=True)
class Healing:
    """A distillation from a model into a pruned one, and the model that this makes.

    Attributes:
        before: the whole model.
        out: the pruned one's folder.
        data: to learn on.
        split: whether its projections are split.
    """

    before: Checkpoint
    out: Path
    data: str
    split: bool

    @property
    def folders(self) -> tuple[Path, Path]:
        """The folder of the run, and that of the healed model."""
        parent, name = self.out.parent, self.out.name
        return parent / f"{name}-adapter", parent / f"{name}-healed"

    def check(self, output: Output) -> None:
        """Read the data before anything is made, with the tokenizer that both models have.

        Raises:
            ConversionError: for a model that cannot be healed as a whole.
            DataError: where the data cannot be learned from.
        """
        from phimlx.checkpoint.load import build_model
        from phimlx.cli import distill
        from phimlx.cli.train import read_data
        from phimlx.errors import ConversionError

        if build_model(self.before.config).architecture.adapters:
            raise ConversionError(
                "A model with adapters of its own learns from text for text alone, which --heal "
                "cannot make a part of its weights.",
                hint="Leave --heal out, and use what phimlx distill teaches beside the model.",
            )
        session = distill.open_session(self._settings(self.before.folder), False, output)
        read_data(session, output)

    def run(self, tokens: list[int], ignore_memory: bool, output: Output) -> dict[str, Any]:
        """Distill, fuse what is learned, and show what that brings back.

        Args:
            tokens: of the text that both models are measured on.

        Returns:
            What `--json` prints.
        """
        from convert.prune.report import agreement_rows, compare
        from phimlx.checkpoint.folder import Checkpoint
        from phimlx.cli import distill

        healed = self.folders[1]
        part = _Part(json=output.as_json)
        try:
            session = distill.open_session(self._settings(self.out), False, part)
            session.check()
            distill.run(session, False, ignore_memory, part)
            self.fuse()
        except BaseException:
            output.note(self._rest)
            raise
        with output.progress(100, "Comparing", "%") as bar:
            found = compare(self.before, Checkpoint(healed), tokens, bar.update)
        output.table(("Measure", "Whole model", "Healed"), agreement_rows(found))
        output.text(f"{healed}: the pruned model, healed.")
        return {"path": str(healed), "agreements": [asdict(each) for each in found]}

    def fuse(self) -> None:
        """Write the healed model in the layout of the pruned one, quantized where that is."""
        from convert import convert
        from convert.prune.plan import Pruning
        from convert.prune.write import write_pruned
        from phimlx.checkpoint.folder import Checkpoint

        adapter, healed = self.folders
        if not self.split:
            convert(self.out, healed, adapter=adapter)
            return
        # Fusing takes the layout apart that others need; leaving nothing out writes it again.
        with TemporaryDirectory(dir=healed.parent, prefix=f".{healed.name}-") as folder:
            fused = Path(folder) / "fused"
            convert(self.out, fused, adapter=adapter)
            write_pruned(Checkpoint(fused), healed, Pruning(), lambda nbytes: None, split=True)

    def _settings(self, student: Path) -> DistillSettings:
        from phimlx.training.distill.settings import DistillSettings

        adapter = str(self.folders[0])
        teacher = str(self.before.folder)
        return DistillSettings(
            teacher=teacher, model=str(student), data=self.data, adapter_path=adapter
        )

    @property
    def _rest(self) -> str:
        """How a person goes on where this was stopped."""
        adapter, healed = self.folders
        fuse = f"fuse --model {self.out} --adapter-path {adapter} --save-path {healed}"
        if self.split and self.before.quantization is None:
            fuse = f"convert {self.out} --adapter-path {adapter} --mlx-path {healed}"
            fuse += " --export hf --split-projections"
        return (
            f"{self.out} is pruned, and not healed yet. What is left to do:\n"
            f"  phimlx distill --resume --teacher {self.before.folder} --student {self.out} "
            f"--data {self.data} --adapter-path {adapter}\n"
            f"  phimlx {fuse}"
        )


class _Part(Output):
    """Output of a command that is a part of another one, whose result is told by that."""

    def json(self, value: Any) -> None:
        """Nothing."""
