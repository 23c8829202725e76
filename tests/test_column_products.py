"""Products that read only the wanted inputs on a GPU: their kernels interpreted on the CPU, and compiled without a GPU.

None of this ran on a GPU (docs/gpu.md).
"""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles import Bundle, ConfigError, open_bundle
from coreinfer.bundles.formats import LOW_MEAN
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch import column_choice, column_products
from coreinfer.runtime.engines.torch.column_layout import Columns, column_bytes, lay_out_columns
from coreinfer.runtime.engines.torch.column_trial import gain_of_columns
from coreinfer.runtime.engines.torch.decoder import TorchDecoder, device_needs
from coreinfer.runtime.engines.torch.wanted_inputs import Entering, InputCounts, take
from coreinfer.runtime.load_options import LoadOptions

from .fake_device import FakeDevice

CPU = torch.device("cpu")
SHARE = 0.6
PROMPT_IDS, NEXT_IDS = [1, 57, 200, 300, 21, 99, 140, 7], [9, 8, 77]
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs Triton, and TRITON_INTERPRET=1 as make test sets it"
)

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
        got = column_products.multiply_columns(columns, values, norms, thresholds)
        torch.testing.assert_close(got[: shape[0]], expected, atol=2e-5, rtol=1e-5)
        assert not got[shape[0] :].any()
        again = column_products.multiply_columns(columns, values, norms, thresholds)
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
    before = column_products.multiply_columns(columns, values, norms, thresholds)
    columns.high[:100][values.abs() <= 0.5] ^= 0x5A
    columns.low[:100][values.abs() <= 1.0] ^= 0xA5
    columns.high[100:], columns.low[100:] = 0x33, 0xCC
    assert torch.equal(column_products.multiply_columns(columns, values, norms, thresholds), before)
    columns.low[:100][values.abs() > 1.0] ^= 0x01
    assert not torch.equal(column_products.multiply_columns(columns, values, norms, thresholds), before)


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
        for target, part in zip((codes, scales, zeros), grid, strict=True):
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


# The engine


@pytest.fixture(scope="module")
def halved_bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Bundle]:
    """A function (family) that opens a bundle whose tokens read inputs in half."""
    return lambda family="llama", **options: open_bundle(
        tiny_bundle(family, token_share=SHARE, quantize="int4", **options)
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many outputs each product of the kernels had."""
    seen: list[int] = []
    multiply = column_products.multiply_columns

    def counted(columns: Columns, *rest: torch.Tensor) -> torch.Tensor:
        outputs = multiply(columns, *rest)
        seen.append(len(outputs))
        return outputs

    monkeypatch.setattr(column_products, "multiply_columns", counted)
    return seen


def logits_of(decoder: TorchDecoder, choice: FfnChoice) -> Floats:
    """Logits of tokens that are decoded with a choice, after a prompt that the dense FFN read."""
    decoder.truncate(0)
    decoder.use(DENSE)
    decoder.forward(PROMPT_IDS)
    decoder.use(choice)
    return np.stack([decoder.forward([token_id])[0] for token_id in NEXT_IDS])


@needs_interpreter
@pytest.mark.parametrize(
    ("family", "weights", "halves"),
    [
        ("llama", "auto", True),
        ("llama", "packed", True),
        ("llama", "auto", False),
        ("phi3", "auto", True),
        ("opt", "auto", True),
        ("opt", "packed", True),
    ],
)
def test_decoding_by_columns_is_masked_decoding(
    family: str, weights: str, halves: bool, halved_bundle: Callable[..., Bundle], launches: list[int]
) -> None:
    bundle = halved_bundle(family) if halves else halved_bundle(family, half_inputs=False)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "weights": weights}
    used = TorchDecoder(bundle, input_skipping="on", **options)
    masked = TorchDecoder(bundle, input_skipping="masked", **options)
    num_layers = bundle.manifest.model.num_layers
    for choice in (
        FfnChoice(cluster=2, token_share=0.5),
        FfnChoice(token_share=0.7),
        FfnChoice(cluster=0, token_share=0.5),
    ):
        launches.clear()
        got = logits_of(used, choice)
        # One for each group of each layer and token.
        assert len(launches) == 4 * num_layers * len(NEXT_IDS)
        expected = logits_of(masked, choice)
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        assert not np.allclose(expected, logits_of(masked, choice.whole), atol=1e-2)
        assert len(launches) == 4 * num_layers * len(NEXT_IDS)


@needs_interpreter
def test_what_is_not_one_token_is_masked(halved_bundle: Callable[..., Bundle], launches: list[int]) -> None:
    bundle, shared = halved_bundle(), FfnChoice(cluster=1, token_share=0.5)
    used, masked = (
        TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping=asked) for asked in ("on", "masked")
    )
    for decoder in (used, masked):
        decoder.forward(PROMPT_IDS)
        decoder.use(shared)
    rows = [decoder.forward(NEXT_IDS, all_logits=True) for decoder in (used, masked)]
    assert np.array_equal(*rows)
    # What is counted is masked, for the kernels' counts stay on the device.
    used.masks.counts = counts = InputCounts()
    used.forward([5])
    assert counts.num_wanted
    assert launches == []
    used.masks.counts = None
    used.forward([5])
    assert launches


@needs_interpreter
def test_recorded_steps_go_by_the_columns_in_use(halved_bundle: Callable[..., Bundle], launches: list[int]) -> None:
    bundle, device = halved_bundle(), FakeDevice()
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "gpu_memory_mb": 1000.0, "cuda_graphs": "on"}
    static = TorchDecoder(bundle, input_skipping="on", transfer=device, **options)
    columns: Any = static.masks._columns
    device.recorded_addresses = lambda: [part.data_ptr() for part in columns.held]
    masked = TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="masked")
    # Packs of the same shapes; the fake device refuses to repeat a step whose columns moved.
    for cluster, share in ((2, 0.5), (0, 0.5), (0, 0.8), (2, 0.7)):
        choice = FfnChoice(cluster=cluster, token_share=share)
        np.testing.assert_allclose(logits_of(static, choice), logits_of(masked, choice), atol=1e-4, rtol=1e-4)
    assert launches
    assert device.num_recorded == 1


# What is asked for, and what can be had


@needs_interpreter
def test_columns_have_room_on_a_device(halved_bundle: Callable[..., Bundle]) -> None:
    bundle = halved_bundle()
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    needs = device_needs(bundle, **options)
    decoder = TorchDecoder(bundle, input_skipping="on", gpu_memory_mb=1000.0, **options)
    columns: Any = decoder.masks._columns
    decoder.use(FfnChoice(token_share=0.5))
    held = sum(part.nbytes for part in columns.held)
    roomy = TorchDecoder(bundle, input_skipping="masked", gpu_memory_mb=1000.0, **options)
    assert roomy._placement.kv_room_bytes - decoder._placement.kv_room_bytes == held  # type: ignore[operator]
    for missing, said in (
        (held // 2, r"for columns [\d.]+ \(none with input_skipping 'masked'\)"),
        (0, "input_skipping 'on': there is no room for .* beside the dense FFN; use 'masked'"),
    ):
        limit_mb = (needs.least + held - missing) / 1e6
        with pytest.raises(ConfigError, match=said):
            TorchDecoder(bundle, input_skipping="on", gpu_memory_mb=limit_mb, **options)
        TorchDecoder(bundle, input_skipping="auto", gpu_memory_mb=limit_mb, **options)


def test_on_is_refused_where_it_cannot_be(
    halved_bundle: Callable[..., Bundle], tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = halved_bundle()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"input_skipping 'on': it needs the package triton.*; use 'masked'"):
            TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")
    if not INTERPRETED:
        return
    plain = open_bundle(tiny_bundle("llama", token_share=SHARE, quantize="int8"))
    with pytest.raises(ConfigError, match="input_skipping 'on': no matrices of this bundle can be read input by input"):
        TorchDecoder(plain, device="cpu", dtype="float32", input_skipping="on")
    monkeypatch.setattr(column_choice, "multiply_columns", lambda columns, *rest: torch.ones(1024))
    with pytest.raises(ConfigError, match="input_skipping 'on': its product is wrong by"):
        TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"input_skipping 'on': expected a CUDA device .*, got device 'cpu'"):
        TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")


def test_the_cpu_is_masked_unless_asked_and_off_reads_all(halved_bundle: Callable[..., Bundle]) -> None:
    bundle = halved_bundle()
    for asked in ("auto", "masked"):
        decoder = TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping=asked)
        assert decoder.masks._columns is None
        assert decoder.token_shares_pay
    assert not TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="off").token_shares_pay
    for asked in ("auto", "on", "masked", "off"):
        assert LoadOptions(engine="torch", input_skipping=asked).input_skipping == asked


@pytest.mark.parametrize(("gain", "is_used"), [(1.04, False), (1.06, True), (None, False)])
def test_a_gpu_leaves_out_where_its_trial_gains(
    gain: float | None,
    is_used: bool,
    halved_bundle: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle, shapes = halved_bundle(), []

    def tried(given: Any, *_rest: Any, **_options: Any) -> float:
        shapes.append(given)
        if gain is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gain

    monkeypatch.setattr(column_choice, "gain_of_columns", tried)
    monkeypatch.setattr(column_choice, "_can_have", lambda *_: True)
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    model = bundle.manifest.model
    assert shapes[0][3] == (model.ffn_dim, model.hidden_size, True)
    assert shapes[0][2] == (model.hidden_size, 2 * model.ffn_dim, True)
    assert (decoder.masks._columns is not None) == is_used
    assert ("CUDA out of memory" in caplog.text) == (gain is None)
    TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=1000.0)
    assert len(shapes) == 1


def test_auto_says_what_keeps_a_gpu_from_it(
    halved_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    family: Any = None
    monkeypatch.setattr(column_choice, "columns_problem", lambda device: "no compiler")
    cuda = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        assert not column_choice._can_have(halved_bundle().manifest, family, "auto", cuda)
    assert "unwanted inputs are read, and count as 0: no compiler" in caplog.text


@needs_interpreter
@pytest.mark.parametrize("packed", [False, True])
def test_the_trial_times_both_ways(packed: bool) -> None:
    gain = gain_of_columns([(64, 600, False), (96, 64, True)], CPU, torch.float32, packed=packed, least_bytes=1)
    assert 0 < gain < 1000
