"""Triton kernels: a product that reads only the wanted inputs' weights. Import this only where Triton is installed.

It ran on no GPU yet, only in Triton's interpreter on the CPU (docs/gpu.md). `column_layout` says how the weights lie.
The functions are compiled by `triton.jit` below, not where they stand, so that they keep their types.
"""

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["MULTIPLY", "TAKE", "launch_multiply", "launch_take"]

_LANES = tl.constexpr(32)
"""Inputs that share scales and zero points: `GROUP_SIZE`."""
_LINE_BYTES = tl.constexpr(128)
_TILE_OUTPUTS = tl.constexpr(512)
_CHUNK = tl.constexpr(8)
"""Wanted inputs that are read at once."""
_TAKEN_GROUPS = 4
# Enough that each multiprocessor of a large GPU has several.
_PROGRAMS = 1024
_NUM_WARPS = 4


def _take(
    values: "Any",
    norms: "Any",
    thresholds: "Any",
    num_inputs: "Any",
    num_norms: "Any",
    num_groups: "Any",
    marks: "Any",
    taken: "Any",
    counts: "Any",
    sums: "Any",
    num_taken_groups: tl.constexpr,
) -> None:
    """List the wanted inputs of some groups of 32, in their order; `launch_take` says what is written."""
    group = tl.program_id(0) * num_taken_groups + tl.arange(0, num_taken_groups)
    lane = tl.arange(0, _LANES)[None, :]
    ids = group[:, None] * _LANES + lane
    value = tl.load(values + ids, mask=ids < num_inputs, other=0.0).to(tl.float32)
    score = tl.abs(value) * tl.load(norms + ids, mask=ids < num_norms, other=0.0)
    is_wanted = (ids < num_inputs) & (score > tl.load(thresholds))
    is_whole = is_wanted & (score > tl.load(thresholds + 1))
    place = group[:, None] * _LANES + tl.cumsum(is_wanted.to(tl.int32), axis=1) - 1
    # Groups beyond the last have no inputs, so that nothing of theirs is wanted.
    tl.store(marks + place, (lane + _LANES * is_whole.to(tl.int32)).to(tl.uint8), mask=is_wanted)
    tl.store(taken + place, value, mask=is_wanted)
    is_there = group < num_groups
    tl.store(counts + group, tl.sum(is_wanted.to(tl.int32), axis=1), mask=is_there)
    tl.store(sums + 2 * group, tl.sum(tl.where(is_wanted, value, 0.0), axis=1), mask=is_there)
    in_half = tl.where(is_wanted & (is_whole == 0), value, 0.0)
    tl.store(sums + 2 * group + 1, tl.sum(in_half, axis=1), mask=is_there)


def _code(high: "Any", low: "Any", slot: tl.constexpr) -> Any:
    return (((high >> (2 * slot)) & 3) * 4 + ((low >> (2 * slot)) & 3)).to(tl.float32)


def _rounding(scales: "Any", zeros: "Any", at: "Any", total: "Any", in_half: "Any", low_mean: tl.constexpr) -> Any:
    """Scales of 128 outputs, and what their zero points and the mean of low bits add to a group's sums."""
    scale = tl.load(scales + at).to(tl.float32)
    zero = tl.load(zeros + at).to(tl.float32) * 0.0625
    return scale, scale * (low_mean * in_half - zero * total)


def _multiply(
    high: "Any",
    low: "Any",
    scales: "Any",
    zeros: "Any",
    marks: "Any",
    taken: "Any",
    counts: "Any",
    sums: "Any",
    partial: "Any",
    num_groups: "Any",
    num_groups_each: "Any",
    column_bytes: "Any",
    num_outputs: "Any",
    low_mean: tl.constexpr,
) -> None:
    """Sum up 512 outputs over some groups of inputs; the four slots of a byte have sums of their own."""
    byte, row = tl.arange(0, _LINE_BYTES), tl.arange(0, _CHUNK)
    tile, split = tl.program_id(0), tl.program_id(1)
    first_output = tile * _TILE_OUTPUTS + byte
    sum0 = tl.zeros((_CHUNK, _LINE_BYTES), dtype=tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    rest0 = tl.zeros((_LINE_BYTES,), dtype=tl.float32)
    rest1, rest2, rest3 = rest0, rest0, rest0
    for group in range(split * num_groups_each, tl.minimum((split + 1) * num_groups_each, num_groups)):
        count = tl.load(counts + group)
        part0 = tl.zeros((_CHUNK, _LINE_BYTES), dtype=tl.float32)
        part1, part2, part3 = part0, part0, part0
        for start in range(0, count, _CHUNK):
            place = group * _LANES + start + row
            is_there = start + row < count
            mark = tl.load(marks + place, mask=is_there, other=0).to(tl.int32)
            value = tl.load(taken + place, mask=is_there, other=0.0)[:, None]
            column = ((mark & 31).to(tl.int64) + group * _LANES) * column_bytes
            at = column[:, None] + (tile * _LINE_BYTES + byte)[None, :]
            # What is masked is not read.
            highs = tl.load(high + at, mask=is_there[:, None], other=0).to(tl.int32)
            lows = tl.load(low + at, mask=(mark >= _LANES)[:, None], other=0).to(tl.int32)
            part0 += value * _code_of(highs, lows, 0)
            part1 += value * _code_of(highs, lows, 1)
            part2 += value * _code_of(highs, lows, 2)
            part3 += value * _code_of(highs, lows, 3)
        total, in_half = tl.load(sums + 2 * group), tl.load(sums + 2 * group + 1)
        at_scale = first_output.to(tl.int64) + group * num_outputs
        scale0, more0 = _rounding_of(scales, zeros, at_scale, total, in_half, low_mean)
        scale1, more1 = _rounding_of(scales, zeros, at_scale + _LINE_BYTES, total, in_half, low_mean)
        scale2, more2 = _rounding_of(scales, zeros, at_scale + 2 * _LINE_BYTES, total, in_half, low_mean)
        scale3, more3 = _rounding_of(scales, zeros, at_scale + 3 * _LINE_BYTES, total, in_half, low_mean)
        sum0, rest0 = sum0 + scale0[None, :] * part0, rest0 + more0
        sum1, rest1 = sum1 + scale1[None, :] * part1, rest1 + more1
        sum2, rest2 = sum2 + scale2[None, :] * part2, rest2 + more2
        sum3, rest3 = sum3 + scale3[None, :] * part3, rest3 + more3
    target = partial + split * num_outputs + first_output
    tl.store(target, tl.sum(sum0, axis=0) + rest0)
    tl.store(target + _LINE_BYTES, tl.sum(sum1, axis=0) + rest1)
    tl.store(target + 2 * _LINE_BYTES, tl.sum(sum2, axis=0) + rest2)
    tl.store(target + 3 * _LINE_BYTES, tl.sum(sum3, axis=0) + rest3)


# Whether they are compiled or interpreted is decided here, by TRITON_INTERPRET.
_code_of: Any = triton.jit(_code)
_rounding_of: Any = triton.jit(_rounding)
TAKE: Any = triton.jit(_take)
MULTIPLY: Any = triton.jit(_multiply)

Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def launch_take(values: torch.Tensor, norms: torch.Tensor, thresholds: torch.Tensor, num_groups: int) -> Taken:
    """List the inputs that a token wants, group by group; the host waits for nothing.

    Args:
        values: (inputs,) of any float dtype.
        norms: (inputs or fewer,) float32; further inputs count as 0.
        thresholds: (2,) float32; see `wanted_inputs.take`.
    Returns:
        Of each group of 32 inputs, where its first entries count: (groups, 32) uint8 numbers of wanted inputs in the
        group, plus 32 where they are read whole; (groups, 32) float32 their values; (groups,) int32 how many they are;
        (groups, 2) float32 the sum of their values, and of those that are read in half.
    """
    assert values.is_contiguous() and norms.is_contiguous() and thresholds.is_contiguous()  # noqa: PT018
    marks = torch.empty((num_groups, 32), dtype=torch.uint8, device=values.device)
    taken = torch.empty((num_groups, 32), dtype=torch.float32, device=values.device)
    counts = torch.empty(num_groups, dtype=torch.int32, device=values.device)
    sums = torch.empty((num_groups, 2), dtype=torch.float32, device=values.device)
    TAKE[(triton.cdiv(num_groups, _TAKEN_GROUPS),)](
        values,
        norms,
        thresholds,
        values.numel(),
        norms.numel(),
        num_groups,
        marks,
        taken,
        counts,
        sums,
        num_taken_groups=_TAKEN_GROUPS,
        enable_fp_fusion=True,
    )
    return marks, taken, counts, sums


def launch_multiply(
    planes: tuple[torch.Tensor, torch.Tensor],
    grid: tuple[torch.Tensor, torch.Tensor],
    taken: Taken,
    low_mean: float,
) -> torch.Tensor:
    """Multiply what `launch_take` listed by weights in columns; returns (outputs,) float32.

    The grid of programs depends on shapes alone, and each sum has one order: results repeat to the bit.

    Args:
        planes: high and low halves of codes, (inputs, bytes) uint8.
        grid: scales float16 and sixteenths of zero points uint8, (groups, outputs).
        low_mean: what low bits that are not read are taken for.
    """
    # Kernels get addresses alone, and would read another order as if it were this one.
    assert all(part.is_contiguous() for part in (*planes, *grid))
    (num_groups, num_outputs), num_tiles = grid[0].shape, grid[0].shape[1] // _TILE_OUTPUTS.value
    num_groups_each = triton.cdiv(num_groups, max(1, min(num_groups, _PROGRAMS // num_tiles)))
    num_splits = triton.cdiv(num_groups, num_groups_each)
    partial = torch.empty((num_splits, num_outputs), dtype=torch.float32, device=grid[0].device)
    MULTIPLY[(num_tiles, num_splits)](
        *planes,
        *grid,
        *taken,
        partial,
        num_groups,
        num_groups_each,
        planes[0].shape[1],
        num_outputs,
        low_mean=low_mean,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=True,
    )
    return partial.sum(dim=0)
