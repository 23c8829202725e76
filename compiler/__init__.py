"""The compiler: a model and calibration text in, a bundle out. Needs the extra `coreinfer[compile]`."""

from coreinfer.bundles import Manifest

from .config import CompileConfig
from .progress import Progress, TqdmProgress

__all__ = ["CompileConfig", "Progress", "TqdmProgress", "compile_model"]


def compile_model(config: CompileConfig, progress: Progress | None = None) -> Manifest:
    """Compile a model into the bundle `config.output`; see `coreinfer.compiler.pipeline.compile_model`.

    Raises:
        ConfigError: the packages of the extra `compile` are not installed.
        CoreInferError: the options, the model, the text or the target are wrong; nothing is left behind.
    """
    from coreinfer.bundles.errors import ConfigError

    try:
        # torch and transformers are loaded only when something is compiled, so that `--help` works without them.
        from . import pipeline
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("coreinfer"):
            raise
        raise ConfigError(f"compiling needs the package {error.name}; pip install 'coreinfer[compile]'") from error
    return pipeline.compile_model(config, progress)
