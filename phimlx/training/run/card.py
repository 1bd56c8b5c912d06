"""The README.md of an adapter: what it was made from, how, and how it is used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import phimlx
from phimlx.adapters.adapter import Base

if TYPE_CHECKING:
    from phimlx.training.run.loop import Outcome, TrainingRun
    from phimlx.training.run.session import Session

CARD = """\
---
{front_matter}
---

# {title}

{kind} of {base}, trained with phimlx {version}: {steps:,} steps of {rows} rows{best}.

```
phimlx chat --model {base} --adapter-path {title}
phimlx fuse --model {base} --adapter-path {title} --save-path OUT
```

`run.json` holds all settings, `log.jsonl` what was reported; `checkpoints/` is only needed to go on
with the run.
"""
KINDS = {"lora": "A LoRA adapter", "dora": "A DoRA adapter", "full": "A full fine-tuning"}


def adapter_card(session: Session, run: TrainingRun, outcome: Outcome) -> str:
    """The card's text."""
    settings = session.settings
    base = Base.of(session.folder, session.checkpoint.config)
    best = ""
    if outcome.best_loss is not None:
        best = f", validation loss {outcome.best_loss:.4f} at step {outcome.best_step:,}"
    about = {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "base_model": base.name,
        "base_model_relation": "adapter",
        "tags": ["mlx", "phimlx", settings.fine_tune_type],
    }
    return CARD.format(
        front_matter="\n".join(f"{key}: {json.dumps(value)}" for key, value in about.items()),
        title=session.run_folder.path.resolve().name,
        kind=KINDS[settings.fine_tune_type],
        base=base.name,
        version=phimlx.__version__,
        steps=outcome.step,
        rows=settings.batch_size * settings.grad_accumulation_steps,
        best=best,
    )
