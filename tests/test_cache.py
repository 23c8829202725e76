import json
import mmap
import weakref
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.numpy
import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler import cache as cache_module
from coreinfer.compiler.cache import Cache, stage_key


def fail() -> NoReturn:
    pytest.fail("a stored result must not be computed")


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    return {"transposed": transposed, "bits": np.array([65535], dtype=np.uint16), "nan": np.array([np.nan])}


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    first = cache.arrays("key", arrays)
    for found in (first, cache.arrays("key", fail), Cache(tmp_path / "new" / "folder").find_arrays("key")):
        assert found is not None
        assert set(found) == set(arrays())
        for name, array in arrays().items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["key.safetensors"]


DTYPES = "bool uint8 int8 uint16 int16 float16 uint32 int32 float32 uint64 int64 float64 complex64"
SHAPES: list[tuple[int, ...]] = [(1,), (7,), (0,), (3, 0, 5), (2, 3, 5)]


def every_dtype() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        f"{dtype}.{shape}": rng.integers(0, 100, shape).astype(dtype) for dtype in DTYPES.split() for shape in SHAPES
    }


def is_mapped(array: np.ndarray[Any, Any]) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def test_every_dtype_and_shape_is_mapped(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for found in (cache.arrays("key", every_dtype), cache.find_arrays("key")):
        assert found is not None
        assert set(found) == set(every_dtype())
        for name, array in every_dtype().items():
            assert is_mapped(found[name]), name
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
            assert found[name].flags.aligned, name
            np.testing.assert_array_equal(found[name], array)


def test_computed_arrays_are_let_go_of(tmp_path: Path) -> None:
    computed: list[weakref.ref[Any]] = []

    def compute() -> dict[str, np.ndarray[Any, Any]]:
        array = np.arange(6.0)
        computed.append(weakref.ref(array))
        return {"array": array}

    found = Cache(tmp_path).arrays("key", compute)
    assert [ref() is None for ref in computed] == [True]
    assert found["array"].tolist() == [0, 1, 2, 3, 4, 5]


def test_arrays_that_cannot_be_read_back_are_given_as_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(values: object, path: Path) -> None:
        path.write_bytes(b"half")

    monkeypatch.setattr(cache_module, "save_file", damage)
    found = Cache(tmp_path).arrays("key", arrays)
    np.testing.assert_array_equal(found["transposed"], arrays()["transposed"])
    assert "cannot be read" in caplog.text


def test_writing_to_arrays_changes_nothing_stored(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.arrays("key", lambda: {"array": np.arange(5, dtype=np.float32)})["array"]
    before = (tmp_path / "key.safetensors").read_bytes()
    # torch warns of memory that it cannot write to, and warnings are errors here.
    torch.from_numpy(first).mul_(2)
    assert first.tolist() == [0, 2, 4, 6, 8]
    second = cache.find_arrays("key")
    assert second is not None
    assert second["array"].tolist() == [0, 1, 2, 3, 4]
    assert (tmp_path / "key.safetensors").read_bytes() == before


def test_arrays_outlive_their_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.arrays("key", arrays)
    cache.store("key", {"other": np.zeros(1000)})
    (tmp_path / "key.safetensors").unlink()
    np.testing.assert_array_equal(first["transposed"], arrays()["transposed"])


def test_metadata_is_no_array(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.arange(3)}, tmp_path / "key.safetensors", metadata={"format": "np"})
    found = Cache(tmp_path).find_arrays("key")
    assert found is not None
    assert {name: array.tolist() for name, array in found.items()} == {"a": [0, 1, 2]}


def test_json_is_the_same_computed_and_read(tmp_path: Path) -> None:
    value = {"tuple": (1, 2.5), 3: None, "text": "grüße\n\u2028"}
    cache = Cache(tmp_path)
    computed = cache.json("key", lambda: value)
    assert computed == {"tuple": [1, 2.5], "3": None, "text": "grüße\n\u2028"}
    assert cache.json("key", fail) == computed


def test_without_a_folder_everything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache, calls = Cache(None), []

    def compute() -> list[int]:
        calls.append(1)
        return calls

    assert cache.json("key", compute) == [1]
    assert cache.json("key", compute) == [1, 1]
    assert set(cache.arrays("key", arrays)) == set(arrays())
    assert cache.find_arrays("key") is None
    assert [*tmp_path.iterdir()] == []


def test_other_keys_are_other_results(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.json("one", lambda: 1) == 1
    assert cache.json("two", lambda: 2) == 2
    assert cache.find_arrays("one") is None


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "[:9]])
def test_damaged_files_are_computed_again(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    for name in ("a.safetensors", "a.json"):
        (tmp_path / name).write_bytes(content)
    assert cache.find_arrays("a") is None
    assert set(cache.arrays("a", arrays)) == set(arrays())
    assert cache.json("a", lambda: [1]) == [1]
    assert str(tmp_path / "a.safetensors") in caplog.text
    assert str(tmp_path / "a.json") in caplog.text
    assert set(cache.arrays("a", fail)) == set(arrays())
    assert cache.json("a", fail) == [1]


def test_a_file_cut_short_is_computed_again_at_every_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, path = Cache(tmp_path), tmp_path / "a.safetensors"
    cache.arrays("a", arrays)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        assert cache.find_arrays("a") is None
        assert f"{path} cannot be read" in caplog.text
    path.write_bytes(whole)
    assert set(cache.arrays("a", fail)) == set(arrays())


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"array": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "header",
    [
        entry(shape=[4], offsets=[0, 16]),
        entry(offsets=[8, 16]),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(offsets=[8, 0]),
        entry(offsets="08"),
        entry(dtype="BF16", shape=[4]),
        entry(dtype="X9"),
        entry(shape=[2] + [1] * 99),
        {"array": 1},
        [],
    ],
)
def test_a_damaged_header_is_computed_again(header: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    cache = Cache(tmp_path)
    assert cache.find_arrays("a") is None
    assert "cannot be read" in caplog.text
    assert set(cache.arrays("a", arrays)) == set(arrays())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_while_computing_stores_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def compute() -> NoReturn:
        raise error

    cache = Cache(tmp_path)
    with pytest.raises(error):
        cache.arrays("key", compute)
    with pytest.raises(error):
        cache.json("key", compute)
    assert [*tmp_path.iterdir()] == []


def test_an_exception_while_writing_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(values: object, path: Path) -> NoReturn:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).arrays("key", arrays)
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(values: object, path: Path) -> NoReturn:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(ConfigError, match=r"--cache .*No space left on device.*--no-cache"):
        Cache(tmp_path).arrays("key", arrays)
    assert [*tmp_path.iterdir()] == []


def test_keys_follow_stage_and_inputs_but_not_their_order() -> None:
    key = stage_key("profile", model="a", options={"x": 1, "y": [2, 3]})
    assert key == stage_key("profile", options={"y": [2, 3], "x": 1}, model="a")
    others = [
        stage_key("embed", model="a", options={"x": 1, "y": [2, 3]}),
        stage_key("profile", model="b", options={"x": 1, "y": [2, 3]}),
        stage_key("profile", model="a", options={"x": 1, "y": [3, 2]}),
        stage_key("profile", model="a", options={"x": 1, "y": [2, 3]}, more=None),
    ]
    assert len({key, *others}) == 5
    assert key.startswith("profile-")
    assert Path(key).name == key


def test_stored_json_can_be_read_by_people(tmp_path: Path) -> None:
    Cache(tmp_path).json("key", lambda: ["grüße"])
    assert "grüße" in (tmp_path / "key.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "key.json").read_text(encoding="utf-8")) == ["grüße"]
