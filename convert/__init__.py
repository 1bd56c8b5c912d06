"""Model folders -> MLX folders: `convert(source, out, Quantization(bits=4))`.

Knows checkpoints and the catalogue; knows nothing of the command line, and never prints.
"""

from convert.pipeline import Conversion, Plan, convert, plan
from convert.quantize.calibrated import Learning
from convert.quantize.recipe import Quantization, Recipe, read_recipe

__all__ = [
    "Conversion",
    "Learning",
    "Plan",
    "Quantization",
    "Recipe",
    "convert",
    "plan",
    "read_recipe",
]
