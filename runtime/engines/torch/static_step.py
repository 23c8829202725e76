"""Decoding one token with fixed shapes and addresses, so that a device can record the step and repeat it.

The KV cache has room for `capacity` tokens from the start and is written in place; what is not filled yet is masked.
The caller runs everything here in inference mode.
"""

import logging
from collections.abc import Hashable
from typing import Any

import torch
from coreinfer.bundles import ConfigError
from coreinfer.bundles.families import cache_argument
from transformers.cache_utils import Cache, StaticLayer

from .transfer import Transfer

__all__ = ["StaticStep", "pick_static"]

_log = logging.getLogger(__name__)
_FIRST_CAPACITY = 1024
_TOLERANCE = 0.01
"""Of logits, relative: the kernels are the same, only their order in time may differ."""


class StaticStep:
    """A model with a KV cache of fixed shape, and the recorded steps of decoding with it."""

    def __init__(self, model: Any, transfer: Transfer, *, num_layers: int, required: bool) -> None:
        """Begin with an empty cache; memory is taken when the first tokens come.

        Args:
            required: let it be an error that a step cannot be recorded; else it then runs as it is, with a warning.
        """
        self._model, self._transfer = model, transfer
        self._required = required
        self._recorded: dict[Hashable, Any] = {}
        self._can_record = True
        device = transfer.device
        self._token = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._position = torch.zeros((1, 1), dtype=torch.long, device=device)
        self._logits: torch.Tensor | None = None
        self.num_cached = 0
        self.capacity = 0
        # The cache itself works on this list; what it may hold besides is of no concern here.
        self._kv: list[Any] = [StaticLayer(0) for _ in range(num_layers)]
        self._cache = Cache(layers=self._kv)
        self._mask = torch.ones((1, 0), dtype=torch.long, device=device)

    @property
    def kept(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, (1, heads, capacity, head_dim)."""
        return [(layer.keys, layer.values) for layer in self._kv]

    def capacity_for(self, num_tokens: int, *, most: int) -> int:
        """Tokens that there will be room for once `num_tokens` are asked for: doubled up to `most`, to grow rarely."""
        capacity = self.capacity or _FIRST_CAPACITY
        while capacity < num_tokens:
            capacity *= 2
        return max(num_tokens, min(capacity, most))

    def reserve(self, capacity: int) -> None:
        """Make room for this many tokens; steps are captured again."""
        if capacity <= self.capacity:
            return
        self._recorded.clear()
        for number, old in enumerate(self._kv):
            new: Any = StaticLayer(capacity)
            if old.is_initialized:
                new.lazy_initialization(old.keys, old.values)
                new.keys[:, :, : self.num_cached] = old.keys[:, :, : self.num_cached]
                new.values[:, :, : self.num_cached] = old.values[:, :, : self.num_cached]
            # One layer at a time, so that at most one is held twice.
            self._kv[number] = new
        self._mask = torch.ones((1, capacity), dtype=torch.long, device=self._transfer.device)
        self.capacity = capacity
        self.truncate(self.num_cached)

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first tokens; their memory is kept too."""
        self.num_cached = min(num_tokens, self.num_cached)
        for layer in self._kv:
            layer.cumulative_length.fill_(self.num_cached)

    def read(self, ids: torch.Tensor, *, logits_to_keep: int) -> torch.Tensor:
        """Append tokens (1, n) in a pass of their own shape; returns logits (1, n or 1, vocabulary)."""
        positions = torch.arange(self.num_cached, self.num_cached + ids.shape[1], device=ids.device)[None]
        logits = self._pass(ids, positions, logits_to_keep)
        self.num_cached += ids.shape[1]
        return logits

    def decode(self, token_id: int, addresses: Hashable) -> torch.Tensor:
        """Append one token; returns logits (1, 1, vocabulary).

        Args:
            addresses: names where the weights in use lie: another recorded step serves other addresses.
        """
        self._token.fill_(token_id)
        self._position.fill_(self.num_cached)
        if addresses not in self._recorded:
            self._recorded[addresses] = self._record()
        self._recorded[addresses]()
        self.num_cached += 1
        assert self._logits is not None
        # The next step writes over them.
        return self._logits.clone()

    def _record(self) -> Any:
        if not self._can_record:
            return self._step
        try:
            recorded = self._transfer.record(self._step, self._rewind)
            self._check(recorded)
            return recorded
        except RuntimeError as error:
            if self._required:
                raise
            _log.warning("decoding continues without a CUDA graph: %s", str(error).strip().split("\n")[0])
            self._can_record = False
            self._rewind()
            return self._step

    def _check(self, recorded: Any) -> None:
        """Compare a recorded step with the step as it is, on the token that is to be decoded.

        Raises:
            RuntimeError: the logits differ.
        """
        expected, got = self._logits_of(self._step), self._logits_of(recorded)
        relative = float((got - expected).norm() / expected.norm())
        # Not a number is no agreement.
        if not relative < _TOLERANCE:
            raise RuntimeError(f"the logits of a recorded step are off by {relative:.1%}")

    def _logits_of(self, step: Any) -> torch.Tensor:
        step()
        self._rewind()
        assert self._logits is not None
        return self._logits.float().clone()

    def _rewind(self) -> None:
        self.truncate(self.num_cached)

    def _step(self) -> None:
        logits = self._pass(self._token, self._position, 1)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)

    def _pass(self, ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        output = self._model(
            ids,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **cache_argument(self._model, self._cache),
        )
        logits: torch.Tensor = output.logits
        return logits


def pick_static(
    model: Any,
    cuda_graphs: str,
    transfer: Transfer | None,
    *,
    num_layers: int,
    device: torch.device,
    mixes: bool,
    shares_caches: bool,
) -> StaticStep | None:
    """Decide whether tokens are decoded in steps of fixed shapes: None for the plain pass.

    Args:
        cuda_graphs: the option of that name.
        mixes: whether the FFN is a mixture of experts.
        shares_caches: whether some layers attend to the keys and values of others.
    Raises:
        ConfigError: they are asked for and cannot be had.
    """
    if cuda_graphs not in ("auto", "on", "off"):
        raise ConfigError(f"cuda_graphs: expected auto, on, off, got {cuda_graphs!r}")
    if cuda_graphs == "on" and mixes:
        raise ConfigError("cuda_graphs: expected auto or off, because each step computes with other experts")
    if cuda_graphs == "on" and shares_caches:
        raise ConfigError("cuda_graphs: expected auto or off, because layers attend to keys and values of others")
    if cuda_graphs == "off" or (cuda_graphs == "auto" and (mixes or shares_caches or device.type != "cuda")):
        return None
    if transfer is None:
        raise ConfigError(
            "cuda_graphs: expected a CUDA device (or device 'cpu' with gpu_memory_mb, which tries the same steps "
            f"without a graph), got device {str(device)!r}"
        )
    with torch.inference_mode():
        return StaticStep(model, transfer, num_layers=num_layers, required=cuda_graphs == "on")
