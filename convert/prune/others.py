"""Which programs run a model, and not what pruning leaves of it.

mlx-lm takes hidden_size / num_attention_heads for the size of a head in its phi3 and phi, whatever
config.json states. transformers reads what is stated, but holds LongRoPE's factors to that
quotient. In the layout with split projections both read what is stated. Sources: mlx-lm 0.32
`models/phi3.py`, `models/phi.py`, `models/llama.py`; transformers 5
`models/phi3/configuration_phi3.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from phimlx.models.base import CausalLM


@dataclass(frozen=True)
class Lost:
    """Programs that run the whole model and not the pruned one, and why they do not."""

    programs: tuple[str, ...] = ()
    why: str = ""

    @classmethod
    def of(cls, model: CausalLM, states_head_size: bool, split: bool) -> Lost:
        """Find what is lost.

        Args:
            states_head_size: whether config.json has to state the size of a head.
            split: whether projections are split.
        """
        if not model.architecture.peers:
            return cls(
                ("transformers",),
                f"it runs {model.model_type} by code that comes with the published model and is "
                "not copied",
            )
        if split or not states_head_size:
            return cls()
        factors = model.config.rope.short_factor is not None
        return cls(
            ("mlx-lm", "transformers") if factors else ("mlx-lm",),
            "hidden_size / num_attention_heads is taken for the size of a head, which it is not "
            "with fewer heads",
        )

    @property
    def warning(self) -> str | None:
        """What a person must know before it is made; None for nothing."""
        if not self.programs:
            return None
        return f"What comes out does not load in {' and '.join(self.programs)}: {self.why}."
