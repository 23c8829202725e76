import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
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
