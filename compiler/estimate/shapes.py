"""A model's shapes, from what its own files state: no weights are read."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.families import Family, family_of_config
from coreinfer.compiler.models.sources import ModelSource
from coreinfer.compiler.models.stated import CONFIG, stated_config, stated_text

__all__ = ["Shapes", "read_object", "shapes_of", "stated_shapes"]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the costs of a compile depend on. Counts of weights leave out norms and biases.

    Attributes:
        ffn_dim: neurons of a layer, of all its experts together.
        num_experts, num_chosen: of a layer, and of these for a token; 1 and 1 where the FFN is one.
        num_shared_caches: layers without keys and values of their own.
        other_shapes, exact_shapes: of matrices beside attention and FFN that each token is multiplied by, of all layers
            together; exact ones are stored in bf16, whatever others are.
        table_shapes: of tables of which a token reads a row, beside the embedding.
    """

    num_layers: int
    hidden_size: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    gated: bool
    tied_head: bool
    num_experts: int = 1
    num_chosen: int = 1
    num_shared_caches: int = 0
    other_shapes: tuple[tuple[int, int], ...] = ()
    exact_shapes: tuple[tuple[int, int], ...] = ()
    table_shapes: tuple[tuple[int, int], ...] = ()

    @property
    def expert_dim(self) -> int:
        """Neurons of an FFN, or of each expert."""
        return self.ffn_dim // self.num_experts

    @property
    def num_inner(self) -> int:
        """Matrices into the FFN."""
        return 2 if self.gated else 1

    @property
    def attention_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of one layer's attention matrices: q, k, v, o."""
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        size = self.hidden_size
        return (wide, size), (narrow, size), (narrow, size), (size, wide)

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        return sum(rows * columns for rows, columns in self.attention_shapes)

    @property
    def inner_weights(self) -> int:
        """Of one layer's matrices into the FFN."""
        return self.num_inner * self.down_weights

    @property
    def down_weights(self) -> int:
        """Of one layer's down projection."""
        return self.ffn_dim * self.hidden_size

    @property
    def ffn_weights(self) -> int:
        """Of one layer's FFN."""
        return self.inner_weights + self.down_weights

    @property
    def body_weights(self) -> int:
        """Of all layers."""
        return self.num_layers * (self.attention_weights + self.ffn_weights)

    @property
    def token_weights(self) -> int:
        """Of all layers, that a token is multiplied by."""
        chosen = self.ffn_weights // self.num_experts * self.num_chosen
        return self.num_layers * (self.attention_weights + chosen) + _num_weights(self.other_shapes)

    @property
    def head_weights(self) -> int:
        """Of the head, which is as large as the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def all_weights(self) -> int:
        """Of layers, embedding and head, and what lies beside them."""
        others = _num_weights(self.other_shapes) + _num_weights(self.table_shapes)
        return self.body_weights + self.head_weights * (1 if self.tied_head else 2) + others


def _num_weights(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def stated_shapes(source: ModelSource) -> Shapes:
    """Read the shapes of a model; of one on the Hub from the Hub's cache.

    Raises:
        ConfigError: the model is not on this machine, or its config lacks a size.
        UnsupportedModelError: its family or its quantization is not supported.
    """
    config = stated_config(source, defaults=True)
    return shapes_of(_cached_config(source.location) if config is None else config, source.name)


def _cached_config(repository: str) -> Mapping[str, Any]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, CONFIG)
    except HFValidationError:
        found = None
    path = Path(found) if isinstance(found, str) else None
    config = read_object(path) if path else None
    if path is None or config is None:
        raise ConfigError(
            f"--dry-run: --model {repository} is not on this machine, so that its shapes are not known; "
            f"download it first (hf download {repository}), or give a folder or a .gguf file"
        )
    return stated_text(config, path.parent, f"--model {repository}", defaults=True)


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def shapes_of(config: Mapping[str, Any], name: str) -> Shapes:
    """Take the shapes out of a config.

    Args:
        name: of the model in an error.
    Raises:
        ConfigError: a size is missing or is none.
        UnsupportedModelError: the family is not supported.
    """
    family = family_of_config(config, name)

    def size(field: str, default: int | None = None) -> int:
        value = default if config.get(field) is None else config[field]
        # One for each layer, which are alike.
        value = value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"--dry-run: --model {name}: {CONFIG}: {field}: expected a size, got {value!r}")
        return value

    hidden, num_heads = (size(family.config_field(field)) for field in ("hidden_size", "num_attention_heads"))
    num_experts, num_chosen, dim_field = 1, 1, family.ffn_dim_field
    if family.experts is not None:
        dim_field = family.experts.dim_field
        # transformers has two names for it.
        num_experts = size(family.experts.num_field, config.get("num_local_experts"))
        num_chosen = size("num_experts_per_tok")
    return Shapes(
        # EXAONE's makers have another name for it, which transformers takes as well.
        num_layers=size(family.config_field("num_hidden_layers"), config.get("num_layers")),
        hidden_size=hidden,
        ffn_dim=num_experts * size(dim_field, family.ffn_dim_factor and family.ffn_dim_factor * hidden),
        num_heads=num_heads,
        num_kv_heads=size("num_key_value_heads", num_heads),
        head_dim=size("head_dim", max(1, hidden // num_heads)),
        vocab_size=size("vocab_size"),
        gated=family.gated,
        tied_head=_is_tied(config, family),
        num_experts=num_experts,
        num_chosen=num_chosen,
        **(_stream_shapes(size, config) if family.has_streams else {}),
    )


def _stream_shapes(size: Callable[..., int], config: Mapping[str, Any]) -> dict[str, Any]:
    """Matrices and tables of a model of several streams; a config that leaves a size out has that of its class."""
    hidden, num_layers, width = (size(field) for field in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    streams, rank = size("altup_num_inputs", 4), size("laurel_rank", 64)
    inner = size("hidden_size_per_layer_input", 256)
    layer = [(rank, hidden), (hidden, rank), (inner, hidden), (hidden, inner)]
    exact = [(streams, hidden), (streams * streams, streams), (streams, streams)]
    stated = config.get("activation_sparsity_pattern")
    num_cut = (10 if num_layers > 10 else 0) if stated is None else sum(share > 0 for share in stated)
    return {
        "num_shared_caches": int(config.get("num_kv_shared_layers", 15)),
        "exact_shapes": tuple(exact * num_layers),
        "other_shapes": (
            *layer * num_layers,
            *[(min(hidden, width), hidden)] * num_cut,
            *[(hidden, hidden)] * (2 * (streams - 1)),
            (num_layers * inner, hidden),
        ),
        "table_shapes": ((size("vocab_size_per_layer_input", 262144), num_layers * inner),),
    }


def _is_tied(config: Mapping[str, Any], family: Family) -> bool:
    return bool(config.get("tie_word_embeddings", family.tied_head))
