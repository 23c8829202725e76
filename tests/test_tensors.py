import json
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
import torch
from coreinfer.bundles.errors import BundleCorrupt
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import (
    ALIGNMENT_BYTES,
    StoredTensor,
    TensorFile,
    bf16_to_float32,
    stream_tensors,
    write_tensors,
)
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.quantize import pack as packing
from coreinfer.compiler.quantize.quantize import store_matrix
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .bundle_factory import float32_to_bf16

NUMPY_DTYPES = {"BF16": "uint16", "F16": "float16", "F32": "float32", "I32": "int32", "I8": "int8", "U8": "uint8"}
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3, 0, 5), (7,), (63,), (64,), (3, 5), (2, 3, 11)]


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> StoredTensor:
    """Random bytes, so that every bit pattern (NaN too) can occur."""
    numpy_dtype = np.dtype(NUMPY_DTYPES[dtype])
    data = np.random.default_rng(seed).bytes(int(np.prod(shape)) * numpy_dtype.itemsize)
    return StoredTensor(dtype, np.frombuffer(data, numpy_dtype).reshape(shape))


def mixed_tensors() -> dict[str, StoredTensor]:
    return {
        f"{dtype}.{'x'.join(map(str, shape))}": random_tensor(dtype, shape, seed)
        for seed, (dtype, shape) in enumerate((dtype, shape) for shape in SHAPES for dtype in NUMPY_DTYPES)
    }


def read_raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read a header as the format's own document says, without our reader."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), 8 + size


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def bits_of(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    written = mixed_tensors()
    write_tensors(tmp_path / "x.safetensors", written)
    file = TensorFile(tmp_path / "x.safetensors")
    assert list(file) == list(written)
    assert len(file) == len(written)
    assert file.num_bytes == sum(tensor.array.nbytes for tensor in written.values())
    for name, tensor in written.items():
        assert (file[name].dtype, file[name].array.dtype) == (tensor.dtype, tensor.array.dtype), name
        assert file[name].array.shape == tensor.array.shape, name
        assert bits_of(file[name].array) == bits_of(tensor.array), name


def test_every_tensor_starts_at_a_multiple_of_64_bytes_of_the_file(tmp_path: Path) -> None:
    # Headers of many lengths, so that the padding is not right by luck.
    for length in range(1, 70):
        path = tmp_path / f"{length}.safetensors"
        write_tensors(path, {"n" * length: random_tensor("U8", (length,)), "second": random_tensor("F32", (3,))})
        header, data_start = read_raw_header(path)
        starts = [data_start + header[name]["data_offsets"][0] for name in ("n" * length, "second")]
        assert [start % ALIGNMENT_BYTES for start in starts] == [0, 0]
        assert TensorFile(path)["second"].array.ctypes.data % ALIGNMENT_BYTES == 0


def test_the_safetensors_library_reads_our_files(tmp_path: Path) -> None:
    written = {name: tensor for name, tensor in mixed_tensors().items() if tensor.dtype != "BF16"}
    write_tensors(tmp_path / "x.safetensors", written)
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {name for name in loaded if not name.startswith("__filler__")} == set(written)
    for name, tensor in written.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.array.dtype, tensor.array.shape), name
        assert bits_of(loaded[name]) == bits_of(tensor.array), name


def test_torch_reads_our_bfloat16(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((5, 13)).astype(np.float32)
    write_tensors(tmp_path / "x.safetensors", {"weight": StoredTensor("BF16", float32_to_bf16(values))})
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        loaded = file.get_tensor("weight")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, torch.from_numpy(values).to(torch.bfloat16))


def test_we_read_files_of_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {"a": np.arange(7, dtype=np.int32), "b": np.linspace(0, 1, 9, dtype=np.float32).reshape(3, 3)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert set(file) == {"a", "b"}
    assert np.array_equal(file["a"].array, arrays["a"])
    assert np.array_equal(file["b"].array, arrays["b"])


def test_non_contiguous_arrays_are_written_in_row_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_tensors(tmp_path / "x.safetensors", {"weight": StoredTensor("F32", values)})
    assert np.array_equal(TensorFile(tmp_path / "x.safetensors")["weight"].array, values)


@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.zeros(2, ">f4"), np.zeros(2, np.uint16)])
def test_an_array_that_cannot_carry_its_dtype_is_refused(tmp_path: Path, array: npt.NDArray[Any]) -> None:
    tensors = {"first": random_tensor("F32", (3,)), "weight": StoredTensor("F32", array)}
    with pytest.raises(TypeError, match=r"tensor weight: .* cannot carry F32"):
        write_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(TypeError, match=r"tensor weight: .* cannot carry F32"):
        stream_tensors(tmp_path / "x.safetensors", tensors.items())
    assert [*tmp_path.iterdir()] == []


def transposed() -> StoredTensor:
    return StoredTensor("F32", np.arange(12, dtype=np.float32).reshape(3, 4).T)


@pytest.mark.parametrize(
    "tensors", [{}, mixed_tensors(), {"turned": transposed(), "large": random_tensor("U8", (2_700_001,))}]
)
def test_streamed_files_are_the_same_to_the_byte(tmp_path: Path, tensors: dict[str, StoredTensor]) -> None:
    write_tensors(tmp_path / "whole", tensors)
    written = stream_tensors(tmp_path / "streamed", ((name, tensor) for name, tensor in tensors.items()))
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert list(written.items()) == [(name, (item.dtype, item.array.shape)) for name, item in tensors.items()]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "streamed"}


def test_streaming_holds_one_tensor(tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []

    def tensors() -> Iterator[tuple[str, StoredTensor]]:
        for number in range(4):
            assert all(ref() is None for ref in made)
            tensor = random_tensor("F32", (100,), number)
            made.append(weakref.ref(tensor.array))
            yield str(number), tensor
            del tensor

    assert len(stream_tensors(tmp_path / "x", tensors())) == len(made) == 4


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    tensors = [("weight", random_tensor("F32", (3,))), ("weight", random_tensor("F32", (3,)))]
    with pytest.raises(ValueError, match="tensor weight comes twice"):
        stream_tensors(tmp_path / "x", tensors)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_exception_between_tensors_leaves_the_old_file_alone(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tensors() -> Iterator[tuple[str, StoredTensor]]:
        yield "first", random_tensor("F32", (3,))
        assert len([*tmp_path.iterdir()]) == 2
        raise error

    # With a name, so that a file that stays is seen.
    monkeypatch.setattr(tempfile, "TemporaryFile", tempfile.NamedTemporaryFile)
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error):
        stream_tensors(tmp_path / "x", tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize(("family", "kind"), [("llama", "int4"), ("opt", "bf16"), ("qwen2", "int8")])
def test_bundles_files_are_as_if_written_from_memory(
    family: str, kind: str, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_bundle(family, quantize=kind)
    for name in (LAYOUT.base, LAYOUT.dense, LAYOUT.cluster(0)):
        write_tensors(tmp_path / "x", TensorFile(folder / name))
        assert (folder / name).read_bytes() == (tmp_path / "x").read_bytes(), name


def test_packing_holds_one_matrix(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    files: list[str] = []

    def store(name: str, *args: Any) -> Mapping[str, StoredTensor]:
        assert all(ref() is None for ref in made), name
        parts = store_matrix(name, *args)
        made.extend(weakref.ref(part.array) for part in parts.values())
        return parts

    def stream(path: Path, tensors: Iterator[tuple[str, StoredTensor]]) -> Any:
        files.append(path.name)
        return stream_tensors(path, tensors)

    monkeypatch.setattr(packing, "store_matrix", store)
    monkeypatch.setattr(packing, "stream_tensors", stream)
    manifest = compile_model(replace(tiny_inputs("opt"), quantize="int4", evaluate=False, output=tmp_path / "bundle"))
    packs = [LAYOUT.cluster(number) for number in range(len(manifest.clusters))]
    assert files == [Path(name).name for name in (LAYOUT.base, LAYOUT.dense, *packs)]
    assert len(made) > 3 * len(files)


def test_reading_copies_nothing_and_never_writes_through(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"weight": StoredTensor("F32", np.arange(40, dtype=np.float32))})
    before = path.read_bytes()
    file = TensorFile(path)
    first, second = file["weight"].array, file["weight"].array
    assert np.shares_memory(first, second)
    first[3] = 99  # Frameworks want writable memory; the file must not change under them.
    assert second[3] == 99
    assert path.read_bytes() == before
    assert TensorFile(path)["weight"].array[3] == 3


SPECIAL_FLOATS = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 1.17549435e-38, 9.1835e-41, 3.4028235e38, -3.4028235e38]


def every_rounding_case() -> npt.NDArray[np.float32]:
    """All upper halves with lower halves around the tie: below, at and above, at even and odd upper halves."""
    upper = np.arange(0, 1 << 16, 7, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    patterns = (upper[:, None] | lower).reshape(-1).view(np.float32)
    return np.concatenate([patterns, np.array(SPECIAL_FLOATS, dtype=np.float32)])


def test_bfloat16_rounds_as_torch_does() -> None:
    values = every_rounding_case()
    finite = ~np.isnan(values)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(float32_to_bf16(values)[finite], expected[finite])
    assert np.isnan(bf16_to_float32(float32_to_bf16(values))[~finite]).all()
    assert (~finite).sum() > 100


def test_bfloat16_widens_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(bf16_to_float32(bits), expected, equal_nan=True)
    numbers = bits[~np.isnan(expected)]
    assert np.array_equal(float32_to_bf16(bf16_to_float32(numbers)), numbers)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_conversion_keeps_the_shape(shape: tuple[int, ...]) -> None:
    bits = float32_to_bf16(np.full(shape, 1.5, dtype=np.float32))
    assert (bits.shape, bits.dtype.name) == (shape, "uint16")
    widened = bf16_to_float32(bits)
    assert isinstance(widened, np.ndarray)
    assert (widened.shape, widened.dtype.name) == (shape, "float32")


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{weight: 1}", "cannot be read"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "cannot be read"),
    "a list": (b"[]", "cannot be read"),
    "a number": (b"17", "cannot be read"),
    "nested too deeply": (b'{"weight":' + b"[" * 100_000, "cannot be read"),
    "entry is a string": ({"weight": "F32"}, "cannot be read"),
    "no dtype": ({"weight": {"shape": [2], "data_offsets": [0, 8]}}, "cannot be read"),
    "no shape": ({"weight": {"dtype": "F32", "data_offsets": [0, 8]}}, "cannot be read"),
    "no offsets": ({"weight": {"dtype": "F32", "shape": [2]}}, "cannot be read"),
    "three offsets": (entry(offsets=[0, 4, 8]), "cannot be read"),
    "negative start": (entry(offsets=[-8, 0]), "lies at -8-0"),
    "end before start": (entry(offsets=[8, 0]), "lies at 8-0"),
    "end beyond the data": (entry(shape=[4], offsets=[0, 16]), "lies at 0-16, beyond the 8 bytes"),
    "start beyond the data": (entry(shape=[0], offsets=[1000, 1000]), "beyond the 8 bytes"),
    "offsets beyond 64 bits": (entry(shape=[10**30], offsets=[0, 4 * 10**30]), "beyond the 8 bytes"),
    "offsets are floats": (entry(offsets=[0.0, 8.0]), "lies at"),
    "offsets are booleans": (entry("U8", [1], [False, True]), "lies at"),
    "offsets are strings": (entry(offsets=["0", "8"]), "lies at"),
    "unknown dtype": (entry("F8_E4M3", [8]), "unknown dtype 'F8_E4M3'"),
    "dtype is a list": (entry(["F32"]), "cannot be read"),
    "shape too large": (entry(shape=[3]), r"shape \[3\] has 8 bytes, not 12"),
    "shape too small": (entry(shape=[]), r"shape \[\] has 8 bytes, not 4"),
    "two negative sizes": (entry(shape=[-1, -2]), "impossible shape"),
    "shape of floats": (entry(shape=[2.0]), "impossible shape"),
    "shape of booleans": (entry(shape=[2, True]), "impossible shape"),
    "shape is a number": (entry(shape=2), "impossible shape"),
    "shape is null": (entry(shape=None), "impossible shape"),
    "product wraps to zero": (entry(shape=[2**62, 4], offsets=[0, 0]), "impossible shape"),
    "size beyond 64 bits": (entry(shape=[2**70], offsets=[0, 8]), "impossible shape"),
    "empty but huge": (entry(shape=[0, 2**63], offsets=[0, 0]), "impossible shape"),
    "too many dimensions": (entry(shape=[2] + [1] * 99), "impossible shape"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_damaged_header_is_named(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(BundleCorrupt, match=message) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 101 << 20, 1000])
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, size: int) -> None:
    path = write_raw(tmp_path / "x.safetensors", b"{}", size=size)
    with pytest.raises(BundleCorrupt, match=f"header of {size} bytes in a file of 10"):
        TensorFile(path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": random_tensor("F32", (5,)), "b": random_tensor("BF16", (3,))})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleCorrupt, match=r"x\.safetensors"):
            TensorFile(path)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(BundleCorrupt, match="cannot be mapped") as caught:
            TensorFile(path)
        assert str(path) in str(caught.value)


def refusal(path: Path) -> str | None:
    """Open a file and touch every value in it; the message if it is refused as corrupt."""
    try:
        for tensor in TensorFile(path).values():
            tensor.array.tobytes()
    except BundleCorrupt as error:
        return str(error)
    return None


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
@example(b"")
@example(struct.pack("<Q", 2) + b"{}")
def test_random_bytes_never_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    assert str(path) in (refusal(path) or str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*NUMPY_DTYPES, "", "F64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)
sizes = st.integers(-2, 70) | st.sampled_from([2**31, 2**62, 2**64]) | st.floats(0, 70) | st.booleans()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*NUMPY_DTYPES, "F64"]) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3)


@settings(max_examples=300, deadline=None)
@given(headers | json_values, st.integers(0, 80))
def test_random_headers_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, header: Any, num_bytes: int
) -> None:
    path = write_raw(
        tmp_path_factory.getbasetemp() / "header.safetensors", json.dumps(header).encode(), bytes(num_bytes)
    )
    assert str(path) in (refusal(path) or str(path))
