"""The sentence encoder's size, from what its own files state."""

from dataclasses import dataclass

from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler.models.sources import DEFAULT_ENCODER_HUB_ID, ModelSource
from coreinfer.compiler.models.stated import CONFIG

from .shapes import read_object

__all__ = ["EncoderSize", "encoder_size"]

_FOLDERS = ("", "0_Transformer")


@dataclass(frozen=True, kw_only=True)
class EncoderSize:
    """Weights of its layers, embeddings not counted, and the tokens that it knows."""

    num_weights: int
    vocab_size: int


_DEFAULT = EncoderSize(num_weights=10_616_832, vocab_size=30_522)
"""all-MiniLM-L6-v2, 6 layers of 384 and 1536, where it is still to be downloaded."""


def encoder_size(source: ModelSource) -> EncoderSize:
    """Read the size of an encoder of BERT's form.

    Raises:
        ConfigError: its files do not state one, or are not on this machine.
    """
    if source.path is None:
        if source.location == DEFAULT_ENCODER_HUB_ID:
            return _DEFAULT
        raise ConfigError(
            f"--dry-run: --encoder {source.name} is on the Hub, so that its size is not known; "
            "give a folder, or leave --encoder out"
        )
    found = [config for name in _FOLDERS if (config := read_object(source.path / name / CONFIG)) is not None]
    try:
        config = found[0]
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        num_layers, vocabulary = int(config["num_hidden_layers"]), int(config["vocab_size"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--dry-run: --encoder {source.name}: expected a {CONFIG} with hidden_size, intermediate_size, "
            f"num_hidden_layers and vocab_size, got {type(error).__name__} {error}; leave --dry-run out"
        ) from error
    return EncoderSize(num_weights=num_layers * (4 * hidden**2 + 2 * hidden * inner), vocab_size=vocabulary)
