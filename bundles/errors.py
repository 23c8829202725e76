"""All errors that CoreInfer raises on purpose.

    CoreInferError
    ├── ConfigError              an option or an argument is wrong
    │   └── ContextTooLong       a prompt and its answer are longer than the model's context
    ├── UnsupportedModelError    the model's family has no row in the family table
    ├── CalibrationError         the calibration text is missing, empty or too small
    ├── ModelOutputError         the model computed NaN or infinity
    ├── GenerationCancelled      a generation was cancelled before its first token
    └── BundleError              something is wrong with a bundle
        ├── BundleNotFound       there is no bundle at that path
        ├── BundleVersionError   another schema version wrote it
        └── BundleCorrupt        a file is missing, damaged or does not fit the manifest

A message is one line: what, where, expected, got, what to do.
"""

from collections.abc import Sequence

__all__ = [
    "BundleCorrupt",
    "BundleError",
    "BundleNotFound",
    "BundleVersionError",
    "CalibrationError",
    "ConfigError",
    "ContextTooLong",
    "CoreInferError",
    "GenerationCancelled",
    "ModelOutputError",
    "UnsupportedModelError",
    "join_problems",
]


class CoreInferError(Exception):
    """Base of all errors that CoreInfer raises on purpose."""


class ConfigError(CoreInferError):
    """An option or an argument is wrong."""


class ContextTooLong(ConfigError):
    """A prompt, or a prompt with the requested answer, is longer than the model's context."""


class UnsupportedModelError(CoreInferError):
    """The model's family is not in the family table."""


class CalibrationError(CoreInferError):
    """The calibration text is missing, empty or too small."""


class ModelOutputError(CoreInferError):
    """The model computed NaN or infinity."""


class GenerationCancelled(CoreInferError):
    """A generation was cancelled while its prompt was read, before its first token."""

    def __init__(self, num_read: int, num_prompt_tokens: int) -> None:
        """Say how much of the prompt was read."""
        super().__init__(f"cancelled after {num_read} of {num_prompt_tokens} tokens of the prompt; none was decoded")


class BundleError(CoreInferError):
    """Something is wrong with a bundle."""


class BundleNotFound(BundleError):
    """There is no bundle at the path."""


class BundleVersionError(BundleError):
    """The bundle was written with another schema version."""


class BundleCorrupt(BundleError):
    """A file of the bundle is missing, damaged, or does not fit its manifest."""


def join_problems(problems: Sequence[str]) -> str:
    """Write several problems on one line, numbered when there is more than one."""
    if len(problems) == 1:
        return problems[0]
    numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(problems, start=1))
    return f"{len(problems)} problems: {numbered}"
