"""A compile, as far as it goes without torch: checks, a look into the cache; then the pipeline."""

import logging

from coreinfer.bundles import Manifest
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.bundles.shared.signals import signals_held

from .checks import find_inputs
from .config import CompileConfig
from .finished import identify, take_finished
from .options import TRIED_KEEPS
from .progress import Progress

__all__ = ["compile_model"]

_log = logging.getLogger(__name__)


def compile_model(config: CompileConfig, progress: Progress | None = None) -> Manifest:
    """Compile a model into the bundle `config.output`.

    The same model, text and options again, with a cache, are not compiled again: the bundle is copied.

    Args:
        progress: reports stages as they run; None for no reports.
    Returns:
        The manifest that was written.
    Raises:
        ConfigError: the packages of the extra `compile` are not installed.
        CoreInferError: the options, the model, the text or the target are wrong; no files are left.
    """
    progress, identity = progress or Progress(), None
    with needs_extra("compiling", "compile"):
        inputs = find_inputs(config)
        # Here, not above: torch and transformers take seconds, for which neither `--help` nor a refusal should wait.
        if config.device != "cpu":
            with signals_held():
                from .models.devices import pick_device

            pick_device(config.device)
        if inputs.model.path is not None:
            with progress.stage("hash", 1) as advance:
                identity = identify(config, inputs)
                advance()
            if (manifest := take_finished(config, identity, progress)) is not None:
                return manifest
        with signals_held():
            from . import pipeline
    if config.max_kl is None and config.effective_max_kl is not None:
        found, saved_by = ("token share", "a share") if config.searches_share else ("keep ratio", "--keep")
        _log.warning(
            "each %s may lose KL %g on held-out text (--max-kl); the %s that this takes is found in several tries, "
            "which %s would save",
            "pack" if config.packs == "own" else "cluster",
            config.effective_max_kl,
            found,
            saved_by,
        )
    if config.packs == "auto":
        _log.warning(
            "--packs auto: thin clusters, and packs at keep ratios of %s until bytes rise or the quality is lost, are "
            "all made and measured; each ratio takes about as long as --packs own with --keep, and those that are "
            "chosen are made once more (--dry-run foretells it; --packs thin narrows nothing)",
            ", ".join(f"{keep:g}" for keep in TRIED_KEEPS),
        )
    return pipeline.compile_inputs(config, inputs, identity, progress)
