"""What the codes of MXFP4 stand for; without torch, for GGUF files have them too."""

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["mxfp4_values"]

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


@cache
def mxfp4_values() -> npt.NDArray[np.float64]:
    """What each code is with each scale: (256, 16)."""
    codes = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    values: npt.NDArray[np.float64] = np.ldexp(codes, np.arange(256)[:, None] - _BIAS)
    values[255] = np.nan
    values.flags.writeable = False
    return values
