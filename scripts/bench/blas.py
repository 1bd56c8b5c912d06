"""Loads Debian's OpenBLAS where it is, to be imported before MLX.

MLX's Linux wheel carries a BLAS that is some fifty times slower; the system's, loaded first, takes
its place.
"""

from __future__ import annotations

import ctypes
import glob

for library in glob.glob("/usr/lib/*/openblas-pthread/libopenblas.so.0"):
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
