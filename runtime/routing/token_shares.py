"""What share of the layers' weights a generation decodes with."""

from coreinfer.bundles import Bundle, ConfigError, Manifest
from coreinfer.bundles.token_shares import default_share, least_share
from coreinfer.runtime.engines.protocol import FfnChoice

from .modes import ModePlan

__all__ = ["check_token_share", "decoding_share", "leaves_out"]


def leaves_out(asked: float | None) -> bool:
    """Whether a generation says itself that not all is to be read."""
    return asked is not None and asked < 1


def check_token_share(bundle: Bundle, plan: ModePlan, asked: float | None) -> None:
    """Refuse a share that cannot be had.

    Raises:
        ConfigError: the bundle has no such share, or the mode none.
    """
    if asked is None or not leaves_out(asked):
        return
    if bundle.token_shares is None:
        raise ConfigError(
            f"token_share: this bundle has no token shares, got {asked:g}; leave it out, or compile with --token-share"
        )
    # Stored as float32.
    if asked < (least := least_share(bundle)) - 1e-6:
        raise ConfigError(f"token_share: expected {least:g} to 1 with this bundle, got {asked:g}")
    if plan.needs_statistic:
        raise ConfigError(
            f"token_share: a prompt's own neurons are all read, so that mode {plan.mode!r} expects 1, got {asked:g}; "
            "use mode similarity, dense, lossless or auto"
        )


def decoding_share(manifest: Manifest, asked: float | None, choice: FfnChoice, *, pays: bool) -> float:
    """Return the share that decoding with a choice reads; in mode lossless it is that of drafts.

    Args:
        asked: by the generation; None for the bundle's own.
        pays: whether the decoder leaves anything out; else it reads all, as fast.
    """
    if manifest.token_shares is None or choice.neuron_ids is not None or not pays:
        return 1.0
    return default_share(manifest, choice.cluster) if asked is None else asked
