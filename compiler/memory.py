"""How much memory a compile takes whose weights stay in their file."""

from coreinfer.bundles.errors import ConfigError

from .config import CompileConfig
from .corpus import Corpus
from .models import LoadedModel

__all__ = ["check_memory"]

_PROGRAM_BYTES = 900_000_000
"""Python, torch, FAISS and the sentence encoder."""
_EVALUATED_TEXTS = 16
_MOMENT_MATRICES = 6
"""Square matrices of one layer that are in memory beside those of all clusters: sums, mixtures, a solution's."""


def check_memory(config: CompileConfig, loaded: LoadedModel, corpus: Corpus) -> None:
    """Find out whether a compile gets by with `config.max_memory`; without it nothing is checked.

    Raises:
        ConfigError: it does not.
    """
    if config.max_memory is None:
        return
    num_tokens = sum(len(document.token_ids) for document in (*corpus.calibration, *corpus.validation))
    fixed, per_token, limit = _fixed_bytes(config, loaded), _token_bytes(config, loaded), config.max_memory * 1e9
    if fixed + per_token * num_tokens <= limit:
        return
    fitting = int((limit - fixed) // per_token)
    share = max(0, fitting) / max(1, num_tokens)
    way_out = f"--calibration-tokens {int(config.calibration_tokens * share)}" if fitting > 0 else "a smaller model"
    raise ConfigError(
        f"--max-memory: expected at least {(fixed + per_token * num_tokens) / 1e9:.1f} GB, {fixed / 1e9:.1f} of it "
        f"whatever the text, for {num_tokens} tokens to calibrate on, got {config.max_memory:g}; take {way_out}"
    )


def _fixed_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    record = loaded.record
    layer_values = sum(parameter.numel() for parameter in loaded.layers[0].parameters())
    text_values = config.document_tokens * record.vocab_size
    return (
        _PROGRAM_BYTES
        + config.moment_bytes
        + 2 * layer_values * 4
        + _MOMENT_MATRICES * record.ffn_dim**2 * 4
        + record.num_layers * record.hidden_size**2 * 4
        + text_values * (_EVALUATED_TEXTS // 2 * loaded.dtype.itemsize + 3 * 4)
    )


def _token_bytes(config: CompileConfig, loaded: LoadedModel) -> int:
    """Activations and targets, hidden states before and behind a layer; of each stream those of the second halves."""
    num_streams = 3 if config.evaluate and config.controls else 1
    num_hidden = 1 + 2 + (num_streams + 2) / 2
    return int((loaded.record.ffn_dim + num_hidden * loaded.record.hidden_size) * loaded.dtype.itemsize)
