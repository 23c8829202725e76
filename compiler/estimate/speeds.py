"""What share of the machine's own speeds each stage reaches: measured, the only numbers here that are not counted."""

from collections.abc import Mapping
from dataclasses import dataclass

from .machine import Machine
from .work import Work

__all__ = ["DIVIDED", "IMPORT_SECONDS", "REACHED", "Reached", "stage_seconds"]

IMPORT_SECONDS = 5.0
"""Of torch, transformers and sentence-transformers."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Of one stage.

    Attributes:
        model: share of the machine's products in the model's dtype.
        model_float32: the same where that is float32, if it is another share: what is no product weighs less then.
        floats: share of its products in float32.
        memory: share of its plain reads.
        call_seconds: of a run of one layer, however small it is.
        fixed_seconds: however small everything is.
    """

    model: float = 0.65
    model_float32: float | None = None
    floats: float = 0.65
    memory: float = 0.25
    call_seconds: float = 0.0
    fixed_seconds: float = 0.0


# Fitted to the stages of SmolLM2-135M-Instruct Q4_1 with 40,000 tokens of builtin and 8 clusters, alone on two cores
# with AVX-512 VNNI and bfloat16 but no AMX, whose products reach 180 and 405 GFLOP/s and whose plain reads 33 GB/s. To
# fit them again: compile with --json, compare stage_seconds with those of --dry-run --json, and scale a row's shares.
# `model_float32` was fitted to 20,000 tokens on two cores with AVX2 alone, that of `reconstruct`, `reference` and
# `evaluate` to 200,000 tokens, 16 clusters and keep 0.4 on a Zen 5 as with AVX2 alone.
REACHED: Mapping[str, Reached] = {
    "hash": Reached(memory=0.035),
    "load": Reached(memory=0.012, fixed_seconds=0.3),
    "corpus": Reached(model=0.9, memory=0.02, fixed_seconds=1.0),
    "moments": Reached(call_seconds=0.0004),
    "pack": Reached(memory=0.06),
    "embed": Reached(),
    "distil": Reached(model=0.4, model_float32=0.66),
    "profile": Reached(model=0.7, memory=0.1),
    "sensitivity": Reached(model=0.55),
    "curves": Reached(model=0.58, floats=0.7),
    # Not fitted: products as in `curves`.
    "split": Reached(model=0.58, floats=0.7),
    "reconstruct": Reached(model=0.48, model_float32=0.84, floats=0.8),
    "reference": Reached(model=0.55, model_float32=0.82, memory=0.04),
    "evaluate": Reached(model_float32=0.9, memory=0.08),
    "shares": Reached(model=0.5, memory=0.06),
    "write": Reached(memory=0.03),
}


DIVIDED = frozenset(
    {
        "corpus",
        "moments",
        "reference",
        "embed",
        "distil",
        "profile",
        "sensitivity",
        "curves",
        "split",
        "reconstruct",
        "evaluate",
    }
)
"""Stages whose work several workers share evenly. Of `pack`, packs are shared too, and the larger base is not."""


def stage_seconds(stage: str, work: Work, machine: Machine, *, model_dtype: str, num_workers: int = 1) -> float:
    """Reckon how long a stage takes: its parts run one after another.

    Args:
        machine: speeds that each worker has while all work.
    """
    if stage in DIVIDED and num_workers > 1:
        fixed = REACHED[stage].fixed_seconds
        return fixed + (stage_seconds(stage, work, machine, model_dtype=model_dtype) - fixed) / num_workers
    reached = REACHED[stage]
    narrow = model_dtype == "bfloat16"
    model_gflops = machine.bfloat16_gflops if narrow else machine.float32_gflops
    share = reached.model if narrow or reached.model_float32 is None else reached.model_float32
    return (
        reached.fixed_seconds
        + work.num_calls * reached.call_seconds
        + work.model_flop / (model_gflops * 1e9 * share)
        + work.float_flop / (machine.float32_gflops * 1e9 * reached.floats)
        + work.moved_bytes / (machine.read_gbps * 1e9 * reached.memory)
    )
