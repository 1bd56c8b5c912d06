"""Model folders -> MLX folders: `convert(source, out, Quantization(bits=4))`.

Knows checkpoints and the catalogue; knows nothing of the command line, and never prints.
"""

from convert.pipeline import Conversion, Plan, convert, plan
from convert.recipe import Quantization

__all__ = ["Conversion", "Plan", "Quantization", "convert", "plan"]
