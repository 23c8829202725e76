"""The compiler: a model and calibration text in, a bundle out. Needs the extra `coreinfer[compile]`."""

from .compiling import compile_model
from .config import CompileConfig
from .progress import Progress, TqdmProgress

__all__ = ["CompileConfig", "Progress", "TqdmProgress", "compile_model"]
