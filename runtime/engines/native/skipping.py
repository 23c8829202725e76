"""Whether token shares leave bytes out on this machine, and what a choice leaves out."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.manifest import TokenSharesRecord
from coreinfer.bundles.token_shares import token_thresholds
from coreinfer.runtime.engines.protocol import FfnChoice
from coreinfer.runtime.load_options import InputSkipping

__all__ = ["Skipping"]

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

_LEAST_GAIN = 1.05
"""Of the time of all weights over that of the wanted ones: what is left out costs quality."""
_TRIAL_SHARE = 0.64
_MOST_KNOWN = 64
_ALL = [True] * len(INPUT_GROUPS)


class Skipping:
    """What of its inputs a token reads, by the thresholds of a bundle with token shares."""

    def __init__(self, bundle: Bundle, asked: InputSkipping, *, limited: bool) -> None:
        """Decide nothing yet.

        Args:
            asked: the load option.
            limited: whether the memory for weights is limited, so that they cannot lie in it a second time.
        """
        self._bundle = bundle
        self._asked = asked
        self._known: dict[tuple[int | None, float], Floats] = {}
        self._is_on: bool | None = None
        if bundle.token_shares is None or limited or asked == "off":
            self._is_on = False

    def is_on(self, model: Any) -> bool:
        """Return whether inputs are left out, which is decided when it is first asked.

        Args:
            model: the native module's, with an FFN in use.
        """
        if self._is_on is None:
            record = self._bundle.manifest.token_shares
            assert record is not None
            groups = self._groups_that_gain(model, record) if self._asked == "auto" else _ALL
            self._is_on = any(groups)
            if self._is_on and self._asked != "masked":
                model.lay_out_columns(groups, halves=record.halves)
        return self._is_on

    def _groups_that_gain(self, model: Any, record: TokenSharesRecord) -> list[bool]:
        share = record.default if record.default < 1 else _TRIAL_SHARE
        gains = model.try_columns(share, halves=record.halves)
        groups = [gain >= _LEAST_GAIN for gain in gains]
        _log.info(
            "input_skipping: where tokens read %.2f of the weights, this machine is so many times as fast: %s; %s",
            share,
            ", ".join(f"{name} {gain:.2f}" for name, gain in zip(INPUT_GROUPS, gains, strict=True)),
            "the others are left out" if any(groups) else "nothing is left out",
        )
        return groups

    def thresholds(self, choice: FfnChoice) -> Floats:
        """Return the thresholds of a choice, (layers, 4, 2) float32; see `token_thresholds`.

        Raises:
            ConfigError: the bundle has no such share.
        """
        key = choice.cluster, choice.token_share
        if key not in self._known:
            if len(self._known) == _MOST_KNOWN:
                self._known.clear()
            self._known[key] = token_thresholds(self._bundle, *key)
        return self._known[key]
