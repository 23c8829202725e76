"""The compiler: a model and calibration text in, a bundle out. Needs the extra `coreinfer[compile]`."""

from coreinfer.bundles import Manifest
from coreinfer.bundles.shared.extras import needs_extra

from .config import CompileConfig
from .progress import Progress, TqdmProgress

__all__ = ["CompileConfig", "Progress", "TqdmProgress", "compile_model"]


def compile_model(config: CompileConfig, progress: Progress | None = None) -> Manifest:
    """Compile a model into the bundle `config.output`; see `coreinfer.compiler.pipeline.compile_model`.

    Raises:
        ConfigError: the packages of the extra `compile` are not installed.
        CoreInferError: the options, the model, the text or the target are wrong; no files are left.
    """
    # torch and transformers are loaded only when something is compiled, so that `--help` works without them.
    with needs_extra("compiling", "compile"):
        from . import pipeline
    return pipeline.compile_model(config, progress)
