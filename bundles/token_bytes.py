"""How many bytes of weights one decoded token reads, by part: what limits the speed on the device."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .families import family_by_name
from .manifest import Manifest, TensorRecord

__all__ = ["TokenBytes", "token_bytes"]

_ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """Bytes that one token reads when decoding greedily; norms, biases and one row of the embedding are left out.

    Attributes:
        pack_ffn, dense_ffn: the FFN narrow, the mean over the clusters, and whole.
        attention: the layers' other matrices.
        routers: of these, those of mixtures of experts, which no token share leaves anything of.
        head: the scores of all tokens; of a screened head the high halves alone.
        other: matrices outside the layers, which few families have.
        cached_token: keys and values of one earlier token, which later tokens read again.
    """

    pack_ffn: int
    dense_ffn: int
    attention: int
    head: int
    other: int
    cached_token: int
    routers: int = 0

    def attention_at(self, share: float) -> float:
        """Of `attention`, what a token reads at a share of the layers' weights."""
        return share * (self.attention - self.routers) + self.routers

    @property
    def pack(self) -> int:
        """All weights that a token reads with a cluster pack."""
        return self.pack_ffn + self.attention + self.head + self.other

    @property
    def dense(self) -> int:
        """All weights that a token reads with the dense FFN."""
        return self.dense_ffn + self.attention + self.head + self.other


def token_bytes(manifest: Manifest) -> TokenBytes:
    """Count from a manifest alone what `NativeDecoder.bytes_per_token` counts from the loaded weights."""
    model, family = manifest.model, family_by_name(manifest.model.family)
    head = f"{family.embedding}.weight" if model.tied_head else "lm_head.weight"
    tables = tuple(f"{path}." for path in (family.embedding, family.positions, *family.tables) if path is not None)
    parts: dict[str, list[TensorRecord]] = {"attention": [], "routers": [], "head": [], "other": []}
    for name, record in manifest.base_tensors.items():
        # A screened head leaves its low halves alone; vectors and rows that are looked up are next to nothing.
        if len(record.shape) < 2 or name.endswith(".low"):
            continue
        if name.startswith(head):
            parts["head"].append(record)
        elif name.startswith(f"{family.layers}."):
            is_router = family.experts is not None and name.endswith(f".{family.experts.module}.router.weight")
            parts["routers" if is_router else "attention"].append(record)
        elif not name.startswith(tables):
            parts["other"].append(record)
    return TokenBytes(
        pack_ffn=manifest.mean_pack_bytes,
        dense_ffn=manifest.ffn_bytes,
        attention=_num_bytes(parts["attention"]) + _num_bytes(parts["routers"]),
        routers=_num_bytes(parts["routers"]),
        head=_num_bytes(parts["head"]),
        other=_num_bytes(parts["other"]),
        # Keys and values, two bytes each; layers that share them read them each for itself.
        cached_token=model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2,
    )


def _num_bytes(records: Iterable[TensorRecord]) -> int:
    return sum(int(np.prod(record.shape, dtype=np.int64)) * _ITEM_BYTES[record.dtype] for record in records)
