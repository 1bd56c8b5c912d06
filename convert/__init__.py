"""Model folders -> MLX folders: `convert(source, out, Quantization(bits=4))`.

Knows checkpoints, adapters and the catalogue; knows nothing of the command line, and never prints.
"""

from convert.api import convert, plan_conversion
from convert.plan import ConversionPlan, ConversionResult
from convert.quantize.calibrated import CalibrationSettings
from convert.quantize.recipe import Quantization, Recipe, read_recipe
from convert.request import ConversionRequest

__all__ = [
    "CalibrationSettings",
    "ConversionPlan",
    "ConversionRequest",
    "ConversionResult",
    "Quantization",
    "Recipe",
    "convert",
    "plan_conversion",
    "read_recipe",
]
