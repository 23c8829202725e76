"""Kernels that read only the wanted inputs' weights: interpreted on the CPU, and compiled for GPUs without one.

None of this ran on a GPU (docs/gpu.md).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles.formats import LOW_MEAN
from coreinfer.runtime.engines.torch.column_layout import column_bytes, lay_out_columns
from coreinfer.runtime.engines.torch.column_products import multiply_columns
from coreinfer.runtime.engines.torch.column_trial import gain_of_columns
from coreinfer.runtime.engines.torch.wanted_inputs import Entering, take

from .interpreting import needs_interpreter

CPU = torch.device("cpu")

Floats = npt.NDArray[np.float32]
Grid = tuple[npt.NDArray[np.uint8], Floats, Floats]


def random_grid(rng: np.random.Generator, num_outputs: int, num_inputs: int) -> Grid:
    """Codes, scales and zeros as `int4_grid` returns them: rows to blocks of 16, columns to groups."""
    rows, groups = -(-num_outputs // 16) * 16, -(-num_inputs // 32)
    scales = (rng.random((rows, groups)) * 0.1).astype(np.float16).astype(np.float32)
    zeros = (rng.integers(0, 241, (rows, groups)) / 16).astype(np.float32)
    return rng.integers(0, 16, (rows, groups * 32), dtype=np.uint8), scales, zeros


def weights_of(grid: Grid, codes: npt.NDArray[Any], shape: tuple[int, int]) -> Floats:
    whole = (codes - grid[2].repeat(32, axis=1)) * grid[1].repeat(32, axis=1)
    return np.asarray(whole[: shape[0], : shape[1]], dtype=np.float32)


# The kernels


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3), (64, 96), (700, 70), (513, 33), (1030, 321)])
def test_the_product_is_that_of_the_masked_inputs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    grid = random_grid(rng, *shape)
    columns = lay_out_columns([grid], [shape[0]], CPU)
    whole, halved = (torch.from_numpy(weights_of(grid, one, shape)) for one in (grid[0], (grid[0] & 12) + LOW_MEAN))
    values = torch.from_numpy(rng.standard_normal(shape[1])).to(dtype)
    norms = torch.from_numpy(rng.random(shape[1]).astype(np.float32))
    seen = set()
    # All wanted, some in half, some without halves, none.
    for limits in ([-1.0, -1.0], [0.1, 0.5], [0.3, 0.3], [1e9, 1e9]):
        thresholds = torch.tensor(limits)
        taken = take(Entering(values=values, is_first=True), norms, thresholds, has_halves=True)
        assert taken.halves is not None
        expected = whole @ (taken.values - taken.halves).float() + halved @ taken.halves.float()
        got = multiply_columns(columns, values, norms, thresholds)
        torch.testing.assert_close(got[: shape[0]], expected, atol=2e-5, rtol=1e-5)
        assert not got[shape[0] :].any()
        again = multiply_columns(columns, values, norms, thresholds)
        assert torch.equal(got, again)
        seen.add(int(taken.is_wanted.sum()))
    assert {0, shape[1]} <= seen
    assert len(seen) > 2


@needs_interpreter
def test_inputs_are_listed_as_the_reference_takes_them() -> None:
    from coreinfer.runtime.engines.torch.column_kernels import launch_take

    rng = np.random.default_rng(1)
    values, norms = (torch.from_numpy(rng.standard_normal(197).astype(np.float32)) for _ in range(2))
    norms = norms.abs()[:190]
    values[[3, 40]] = float("nan")
    thresholds = torch.tensor([0.2, 0.6])
    taken = take(Entering(values=values, is_first=True), norms, thresholds, has_halves=True)
    marks, listed, counts, sums = launch_take(values, norms, thresholds, 7)
    for group in range(7):
        inputs = slice(32 * group, 32 * group + 32)
        ids = taken.is_wanted[inputs].nonzero()[:, 0]
        count = int(counts[group])
        assert marks[group, :count].tolist() == (ids + 32 * taken.is_whole[inputs][ids]).tolist()
        assert torch.equal(listed[group, :count], values[inputs][ids])
        own = taken.values[inputs]
        assert taken.halves is not None
        torch.testing.assert_close(sums[group], torch.stack([own.sum(), taken.halves[inputs].sum()]))


@needs_interpreter
def test_what_is_not_wanted_is_not_looked_at() -> None:
    """Not in any plane; and of what is read in half not the low one."""
    rng = np.random.default_rng(2)
    columns = lay_out_columns([random_grid(rng, 600, 100)], [600], CPU)
    values, norms = torch.from_numpy(rng.standard_normal(100).astype(np.float32)), torch.ones(100)
    thresholds = torch.tensor([0.5, 1.0])
    before = multiply_columns(columns, values, norms, thresholds)
    columns.high[:100][values.abs() <= 0.5] ^= 0x5A
    columns.low[:100][values.abs() <= 1.0] ^= 0xA5
    columns.high[100:], columns.low[100:] = 0x33, 0xCC
    assert torch.equal(multiply_columns(columns, values, norms, thresholds), before)
    columns.low[:100][values.abs() > 1.0] ^= 0x01
    assert not torch.equal(multiply_columns(columns, values, norms, thresholds), before)


@pytest.mark.parametrize("rows", [[40], [30, 5, 600], [64, 512]])
def test_columns_hold_each_code_once(rows: list[int]) -> None:
    """Byte b of a line of 512 outputs: b, 128 + b, 256 + b, 384 + b; matrices lie below each other, then padding."""
    rng = np.random.default_rng(3)
    grids = [random_grid(rng, max(1, count - 3), 70) for count in rows]
    columns = lay_out_columns(grids, rows, CPU)
    width = -(-sum(rows) // 512) * 512
    codes, scales, zeros = np.zeros((width, 96), np.uint8), np.zeros((width, 3)), np.zeros((width, 3))
    start = 0
    for grid, count in zip(grids, rows, strict=True):
        targets: tuple[Any, ...] = (codes, scales, zeros)
        parts: tuple[Any, ...] = grid
        for target, part in zip(targets, parts, strict=True):
            some = part[:count]
            target[start : start + len(some)] = some
        start += count
    for output in (0, 1, 127, 128, 300, 511, width - 1, sum(rows) - 1):
        line, byte = output // 512 * 128 + output % 128, 2 * (output % 512 // 128)
        high, low = ((plane[:, line].numpy() >> byte) & 3 for plane in (columns.high, columns.low))
        np.testing.assert_array_equal(4 * high + low, codes[output])
    np.testing.assert_array_equal(columns.scales.float().numpy().T, scales.astype(np.float32))
    np.testing.assert_array_equal(columns.zeros.numpy().T, zeros * 16)
    held = (columns.high, columns.low, columns.scales, columns.zeros)
    assert all(part.is_contiguous() for part in held)
    assert sum(part.nbytes for part in held) == column_bytes(70, sum(rows))


_COMPILE = """
import sys
import triton
from coreinfer.runtime.engines.torch import column_kernels as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, types, constants, capability):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(names, types.split())),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types.split()) if kind[0] == "*"},
    )
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

for capability in (80, 90):
    for inputs in ("*bf16", "*fp32"):
        types = inputs + " *fp32 *fp32 i32 i32 i32 *u8 *fp32 *i32 *fp32 constexpr"
        assert compiled(kernels.TAKE, types, {"num_taken_groups": 4}, capability).asm["cubin"]
    types = "*u8 *u8 *fp16 *u8 *u8 *fp32 *i32 *fp32 *fp32 i32 i32 i32 i32 constexpr"
    found = compiled(kernels.MULTIPLY, types, {"low_mean": 1.5}, capability).asm
    assert found["cubin"]
    # Columns are read without a detour through shared memory.
    inner = found["ttgir"].split("scf.for")[2].split("scf.yield")[0]
    assert inner.count("tt.load") == 4, inner
    assert "convert_layout" not in inner
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """With Triton's own compiler, which needs no GPU: the interpreter takes much that this refuses."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "import sys; exec(sys.stdin.read())"]
    done = subprocess.run(command, input=_COMPILE, env=environment, check=False, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr


# How much faster


@needs_interpreter
@pytest.mark.parametrize("packed", [False, True])
def test_the_trial_times_both_ways(packed: bool) -> None:
    gain = gain_of_columns([(64, 600, False), (96, 64, True)], CPU, torch.float32, packed=packed, least_bytes=1)
    assert 0 < gain < 1000
