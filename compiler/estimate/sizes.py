"""Bytes of a compile: what a token reads, what the disk holds, and the most memory that each stage needs."""

import math
from collections.abc import Mapping

from coreinfer.bundles.formats import ffn_layer_bytes, matrix_bytes, stored_shapes
from coreinfer.compiler.budget import keep_of_budget, moment_bytes
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.efforts import shares_profile
from coreinfer.compiler.quality.search import searches
from coreinfer.compiler.samples import (
    NEURON_BLOCK,
    NUM_SHARE_LEVELS,
    NUM_SHARE_TARGETS,
    ROUTER_DIMENSION,
    SUMS_BYTES,
    batch_tokens,
)

from .expert_work import expert_repair_bytes
from .shapes import Shapes
from .work import Case, moment_values, num_kept_sums

__all__ = [
    "base_token_bytes",
    "bundle_bytes",
    "ffn_token_bytes",
    "kept_ends",
    "kept_neurons",
    "names_experts",
    "reads_halves",
    "scratch_bytes",
    "stage_needs",
]

_FOUND_KEEP = 0.93
"""What a search for KL 0.1 usually ends with; other qualities are taken for it."""
_TOKENIZER_TOKEN_BYTES = 45
"""Of tokenizer.json, for each token of the vocabulary: its name and its merge."""
_PROGRAM_BYTES = 650_000_000
"""Python, torch, transformers and FAISS."""
_ENCODER_BYTES = 350_000_000
"""The sentence encoder, and what distils it."""
_ARITHMETIC_BYTES = 900_000_000
"""What torch's products keep once the model has run; of SmolLM2-135M, and taken for all models."""
_ROUNDED_WEIGHT_BYTES = 24
"""While the largest matrix is rounded, for each of its weights: in float32, as codes, and what becomes of both."""


def ffn_token_bytes(shapes: Shapes, kind: str, kept: int, num_sharing: int | None = None) -> int:
    """Bytes of FFN weights that one token reads where each layer keeps so many neurons, or so many of experts.

    Args:
        num_sharing: experts of a mixture that share these, each narrower; None where its experts are whole.
    """
    if shapes.num_experts == 1:
        return shapes.num_layers * _ffn_bytes(shapes, kind, kept)
    width = shapes.expert_dim if num_sharing is None else kept // num_sharing
    return shapes.num_layers * shapes.num_chosen * _ffn_bytes(shapes, kind, width)


def _ffn_bytes(shapes: Shapes, kind: str, num_neurons: int) -> int:
    return ffn_layer_bytes(kind, shapes.hidden_size, num_neurons, gated=shapes.num_inner == 2)


def _dense_bytes(shapes: Shapes, kind: str) -> int:
    """Of the dense FFN, all experts."""
    return shapes.num_layers * shapes.num_experts * _ffn_bytes(shapes, kind, shapes.expert_dim)


def _router_bytes(shapes: Shapes) -> int:
    if shapes.num_experts == 1:
        return 0
    return shapes.num_layers * matrix_bytes("bf16", (shapes.num_experts, shapes.hidden_size))


def _attention_bytes(shapes: Shapes, kind: str) -> int:
    """Of attention, routers, and what lies beside attention and FFN."""
    own = shapes.num_layers - shapes.num_shared_caches
    counts = (shapes.num_layers, own, own, shapes.num_layers)
    pairs = zip(counts, shapes.attention_shapes, strict=True)
    attention = sum(count * matrix_bytes(kind, shape) for count, shape in pairs)
    others = sum(matrix_bytes(kind, shape) for shape in shapes.other_shapes)
    others += sum(matrix_bytes("bf16", shape) for shape in shapes.exact_shapes)
    return attention + others + _router_bytes(shapes)


def base_token_bytes(config: CompileConfig, shapes: Shapes) -> int:
    """Bytes of attention and head that a token reads; of an int8 head the high halves alone, which screen it."""
    head = (shapes.vocab_size, shapes.hidden_size)
    read = matrix_bytes(_head_format(config), head)
    if _head_format(config) == "int8-planes":
        read -= math.prod(stored_shapes("", "int8-planes", head)[".low"][1])
    return _attention_bytes(shapes, config.quantize) + read


def _head_format(config: CompileConfig) -> str:
    kind = config.effective_head_quantize
    return "int8-planes" if kind == "int8" else kind


def names_experts(config: CompileConfig, shapes: Shapes) -> bool:
    """Whether packs only name experts of the dense FFN, and have no weights."""
    return shapes.num_experts > 1 and config.experts == "whole"


def reads_halves(config: CompileConfig, shapes: Shapes) -> bool:
    """Whether tokens read inputs in half."""
    return config.allows_halves and shapes.num_experts == 1


def kept_neurons(config: CompileConfig, shapes: Shapes) -> int:
    """Mean neurons that a layer keeps, in whole blocks where all are alike; with `budget_mb` as many as fit.

    Raises:
        ConfigError: not even the smallest narrow FFN fits.
    """
    # A budget counts the whole head.
    head = matrix_bytes(config.effective_head_quantize, (shapes.vocab_size, shapes.hidden_size))
    # Of a mixture those of one expert, as all keep as many.
    num_blocks = shapes.expert_dim / NEURON_BLOCK
    if config.experts == "both":
        num_blocks = math.ceil(num_blocks)
    block = NEURON_BLOCK * shapes.num_experts
    keep = keep_of_budget(
        config,
        fixed_bytes=_attention_bytes(shapes, config.quantize) + head,
        block_bytes=ffn_token_bytes(shapes, config.quantize, block, shapes.num_experts) // shapes.num_layers,
        num_layers=shapes.num_layers,
        blocks_per_layer=num_blocks,
    )
    if searches(config):
        keep = _FOUND_KEEP
    if names_experts(config, shapes):
        return max(shapes.num_chosen, round(keep * shapes.num_experts)) * shapes.expert_dim
    if config.experts == "both":
        return round(keep * shapes.ffn_dim)
    if keep == 1 or shapes.expert_dim <= NEURON_BLOCK:
        return shapes.ffn_dim
    if config.effective_budgets != "uniform":
        return round(keep * shapes.ffn_dim)
    blocks = math.floor(keep * num_blocks + 1e-6) if config.budget_mb is not None else round(keep * num_blocks)
    return max(NEURON_BLOCK, blocks * NEURON_BLOCK) * shapes.num_experts


def kept_ends(config: CompileConfig, shapes: Shapes) -> list[tuple[int, int]]:
    """Mean neurons that a layer keeps, and experts that share them; how many do is known beforehand but in one case.

    With `--experts both` there are two ends, unless they are one: first as many experts as can stay, which is so where
    routers use all of them, and then as few. With `budget_mb` these are as wide, else they share as many neurons.
    """
    kept = kept_neurons(config, shapes)
    if config.experts != "both" or kept == shapes.ffn_dim:
        return [(kept, shapes.num_experts)]
    full, narrowest = shapes.expert_dim, min(NEURON_BLOCK, shapes.expert_dim)
    most = max(shapes.num_chosen, min(shapes.num_experts, kept // narrowest))
    if config.budget_mb is None:
        fewest = max(shapes.num_chosen, kept // full)
        widths = [min(full, max(narrowest, kept // count)) for count in (most, fewest)]
    else:
        widths = [kept // most] * 2
        floor = min(config.min_layer_keep * shapes.ffn_dim, kept)
        fewest = max(shapes.num_chosen, math.ceil(floor / widths[0]))
    if config.effective_budgets == "uniform":
        widths = [width if width == full else width // NEURON_BLOCK * NEURON_BLOCK for width in widths]
    ends = [(count * width, count) for count, width in zip((most, fewest), widths, strict=True)]
    return ends if most != fewest else ends[:1]


def bundle_bytes(config: CompileConfig, case: Case) -> int:
    """Bytes of the bundle: base, packs, dense FFN, router and tokenizer."""
    shapes = case.shapes
    tables = (1 if shapes.tied_head else 2) * matrix_bytes(
        _head_format(config), (shapes.vocab_size, shapes.hidden_size)
    )
    tables += sum(matrix_bytes(_head_format(config), shape) for shape in shapes.table_shapes)
    dense = _dense_bytes(shapes, config.quantize) if config.dense else 0
    router = case.encoder_vocabulary * (2 * ROUTER_DIMENSION + _TOKENIZER_TOKEN_BYTES)
    tokenizer = shapes.vocab_size * _TOKENIZER_TOKEN_BYTES
    packs = case.num_clusters * _pack_bytes(config, case)
    shares = _shares_bytes(case) if config.token_share is not None else 0
    return _attention_bytes(shapes, config.quantize) + tables + dense + packs + shares + router + tokenizer


def _shares_bytes(case: Case) -> int:
    """Thresholds of the dense FFN and of each cluster, the plan, and the norms of columns."""
    shapes = case.shapes
    groups = 4 * shapes.num_layers
    norms = shapes.num_layers * ((2 + shapes.num_experts) * shapes.hidden_size + shapes.ffn_dim)
    return 4 * (groups * ((case.num_clusters + 1) * NUM_SHARE_LEVELS + NUM_SHARE_TARGETS) + norms)


def _pack_bytes(config: CompileConfig, case: Case) -> int:
    """A pack's matrices and their norms, its neuron ids and all neurons' scores; nothing of a thin cluster."""
    shapes = case.shapes
    if config.packs == "thin":
        return 0
    if names_experts(config, shapes):
        return 4 * shapes.num_layers * (case.kept // shapes.expert_dim + shapes.num_experts)
    count = case.num_kept_experts
    weights = count * _ffn_bytes(shapes, config.quantize, case.kept_width)
    norms = 0 if config.token_share is None else 4 * (count * shapes.hidden_size + case.kept)
    listed = 4 * count if config.experts == "both" else 0
    return shapes.num_layers * (weights + 4 * (case.kept + shapes.ffn_dim) + norms + listed)


def scratch_bytes(config: CompileConfig, case: Case, *, item_bytes: int) -> int:
    """Bytes that are on the disk besides the bundle before the compile's end.

    Packs of the controls, what the dense model made of the held-out text, sums that are kept, and stage results.

    Args:
        item_bytes: of an activation.
    """
    shapes = case.shapes
    found = (case.num_packs - case.num_clusters) * _pack_bytes(config, case)
    if config.evaluate or searches(config) or config.searches_share:
        cached = 2 * shapes.num_layers * shapes.num_kv_heads * shapes.head_dim
        # Logits of the second halves; keys and values of the first.
        found += case.held_out_tokens // 2 * (shapes.vocab_size + cached) * item_bytes
    found += _kept_sums_bytes(config, case)
    if config.cache_dir is None and config.max_memory is None:
        return found
    if config.packs == "thin":
        return found
    repaired = 2 * case.num_packs * shapes.num_layers * case.kept * shapes.hidden_size if config.reconstruct else 0
    fisher = 4 * shapes.num_layers * shapes.hidden_size**2
    return found + repaired + fisher


def _kept_sums_bytes(config: CompileConfig, case: Case) -> int:
    shapes = case.shapes
    if config.packs == "thin" or not shares_profile(config) or case.kept == shapes.ffn_dim:
        return 0
    sums = 4 * shapes.num_layers * num_kept_sums(case) * moment_values(shapes)
    return sums if sums <= SUMS_BYTES else 0


def stage_needs(
    config: CompileConfig, case: Case, samples: Mapping[str, int], *, item_bytes: int, num_read: int
) -> dict[str, int]:
    """Most bytes of memory that each stage needs, with the model and the program.

    Args:
        samples: stage -> tokens whose activations it holds.
        item_bytes: of a weight and an activation.
        num_read: packs that one worker scores.
    """
    shapes = case.shapes
    model = case.shapes.all_weights * item_bytes
    square = 4 * shapes.expert_dim * (shapes.expert_dim + shapes.hidden_size)
    if shapes.num_experts > 1:
        moments = expert_repair_bytes(config, case) + 6 * square
    else:
        moments = min(moment_bytes(config), case.num_clusters * 4 * moment_values(shapes)) + 6 * square
    logits = shapes.vocab_size * case.document_tokens * (item_bytes + 3 * 4)
    batch = shapes.vocab_size * max(case.document_tokens, batch_tokens(shapes.vocab_size)) * item_bytes
    files = num_read * _pack_bytes(config, case) + shapes.all_weights
    # What low bits add to the stored weights: of all layers, and of a pack.
    packs = 0 if config.packs == "thin" else shapes.num_layers * shapes.ffn_weights * case.kept // shapes.ffn_dim
    halves = item_bytes * (shapes.body_weights + packs) if reads_halves(config, shapes) else 0
    extra: dict[str, float] = {
        "load": 4 * shapes.head_weights,
        "corpus": shapes.all_weights + 64 * case.document_tokens * shapes.num_layers * 2,
        "moments": _ARITHMETIC_BYTES,
        "pack": _ROUNDED_WEIGHT_BYTES * shapes.head_weights,
        "embed": _ENCODER_BYTES,
        "distil": _ENCODER_BYTES,
        "profile": _ARITHMETIC_BYTES,
        "sensitivity": _ARITHMETIC_BYTES + 1024 * shapes.num_layers * shapes.hidden_size * item_bytes + logits,
        "curves": _ARITHMETIC_BYTES + 4 * square,
        "split": _ARITHMETIC_BYTES + 4 * square,
        "reconstruct": _ARITHMETIC_BYTES + moments,
        "reference": _ARITHMETIC_BYTES + batch + shapes.all_weights + model,
        # The stored dense FFN and a pack's, unpacked, beside the model's own weights.
        "shares": _ARITHMETIC_BYTES + 3 * logits + 2 * model,
        # Files that are read are mapped, and the model's own weights wait meanwhile.
        "evaluate": _ARITHMETIC_BYTES + batch + files + model + halves,
    }
    # What FFNs read and put out; and hidden states before and after a layer.
    kept_bytes = 2 if config.dtype == "auto" else item_bytes
    for stage, tokens in samples.items():
        seen = kept_bytes * (_seen_neurons(shapes, stage) + shapes.hidden_size)
        extra[stage] = extra.get(stage, 0) + tokens * (seen + item_bytes * 2 * shapes.hidden_size)
    return {stage: int(_PROGRAM_BYTES + model + need) for stage, need in extra.items()}


def _seen_neurons(shapes: Shapes, stage: str) -> int:
    """Values that a layer's FFN leaves of each token; of a mixture those of its experts where sums need them."""
    if shapes.num_experts == 1:
        return shapes.ffn_dim
    return shapes.num_chosen * shapes.expert_dim if stage in ("reconstruct", "split") else shapes.num_experts
