"""How much memory a compile takes whose weights stay in their file."""

import math

from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler.budget import MOMENT_SHARE, moment_bytes
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.text.corpus import Corpus

from .load import LoadedModel

__all__ = ["check_memory"]

_PROGRAM_BYTES = 900_000_000
"""Python, torch, FAISS and the sentence encoder."""
_MOMENT_MATRICES = 6
"""Square matrices of one layer in memory, in addition to those of all clusters: sums, mixtures, a solution's."""


def check_memory(config: CompileConfig, loaded: LoadedModel, corpus: Corpus) -> None:
    """Check that a compile fits into `config.max_memory`; without this option nothing is checked.

    Raises:
        ConfigError: it does not.
    """
    if config.max_memory is None:
        return
    # Of each worker, where there are several.
    all_tokens = sum(len(document.token_ids) for document in (*corpus.calibration, *corpus.validation))
    num_tokens = -(-all_tokens // config.num_places)
    # Moments take their share of the bound, whatever it is: the rest must do.
    usable = config.max_memory * 1e9 - moment_bytes(config)
    fixed, per_token = _fixed_bytes(config, loaded), _token_bytes(config, loaded)
    needed = fixed + per_token * num_tokens
    if needed <= usable:
        return
    fitting = int((usable - fixed) // per_token)
    share = max(0, fitting) / max(1, num_tokens)
    way_out = f" or --calibration-tokens {int(config.calibration_tokens * share)}" if fitting > 0 else ""
    raise ConfigError(
        f"--max-memory: expected at least {_bound_gb(needed)} GB, {_bound_gb(fixed)} of it for any text, for "
        f"{num_tokens} tokens to calibrate on, got {config.max_memory:g}; give more{way_out}, or take a smaller model"
    )


def _bound_gb(num_bytes: int) -> float:
    """The lowest limit that leaves this much next to the moments' share, in tenths of a gigabyte."""
    return math.ceil(num_bytes / (1 - MOMENT_SHARE) / 1e8) / 10


def _fixed_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    record = loaded.record
    layer_values = sum(parameter.numel() for parameter in loaded.layers[0].parameters())
    text_values = config.document_tokens * record.vocab_size
    # Embedding and head as they are stored, while quality is measured.
    table_values = record.vocab_size * record.hidden_size * (1 if record.tied_head else 2)
    return (
        _PROGRAM_BYTES
        + table_values * (loaded.dtype.itemsize + 4)
        + 2 * layer_values * 4
        + _MOMENT_MATRICES * record.ffn_dim**2 * 4
        + record.num_layers * record.hidden_size**2 * 4
        # One text's logits at a time: of two models, and in float32.
        + text_values * (loaded.dtype.itemsize + 3 * 4)
    )


def _token_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    """Activations and targets, hidden states before and after a layer; for each stream those of the second halves.

    Keys and values of first halves are taken to be as wide as hidden states: they are, or narrower.
    """
    num_streams = 3 if config.evaluate and config.effective_controls else 1
    num_hidden = 1 + 2 + 1 + (num_streams + 2) / 2
    return int((loaded.record.ffn_dim + num_hidden * loaded.record.hidden_size) * loaded.dtype.itemsize)
