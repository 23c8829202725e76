"""Stage results on shared storage: another machine goes on from them, and half a result is none."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.stage_store import StageStore, local_folder, store_of
from coreinfer.compiler.storage import address_of

from .test_team import files_of
from .test_web_bundles import s3

fsspec = pytest.importorskip("fsspec")

__all__ = ["s3"]

ARRAYS: dict[str, Any] = {"a": np.arange(1000, dtype=np.float32), "b": np.ones((2, 3), dtype=np.int64)}
STORE = StageStore(address="memory://stages")


@pytest.fixture
def memory() -> Iterator[Any]:
    """Storage that is the same for all caches of this process."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def not_again() -> NoReturn:
    pytest.fail("what is stored must not be computed again")


def arrays_of(cache: Cache, compute: Callable[[], Any]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in cache.arrays("key", compute).items()}


EXPECTED = {name: np.asarray(array).tolist() for name, array in ARRAYS.items()}


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://bucket/folder/", "s3://bucket/folder"),
        (Path("s3://bucket/folder"), "s3://bucket/folder"),
        ("memory://a", "memory://a"),
        (Path("file:///tmp/a"), "file:///tmp/a"),
        ("folder/s3", None),
        ("C:/folder", None),
        ("hf:owner/name", None),
    ],
)
def test_an_address_is_told_from_a_path(given: str | Path, address: str | None) -> None:
    assert address_of(given) == address


def test_another_machine_finds_what_one_has_stored(memory: Any, tmp_path: Path) -> None:
    here, there = Cache(tmp_path / "here", STORE), Cache(tmp_path / "there", STORE)
    assert arrays_of(here, lambda: ARRAYS) == EXPECTED
    assert here.json("key", lambda: {"n": 1}) == {"n": 1}
    assert arrays_of(there, not_again) == EXPECTED
    assert there.json("key", not_again) == {"n": 1}
    memory.store.clear()
    # From then on it is there.
    assert arrays_of(there, not_again) == EXPECTED


@pytest.mark.parametrize("damage", ["truncated", "no digest", "other bytes"])
def test_half_a_result_is_computed_again_and_published(
    damage: str, memory: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays_of(Cache(tmp_path / "here", STORE), lambda: ARRAYS)
    data = memory.cat_file("/stages/key.safetensors")
    if damage == "no digest":
        memory.rm_file("/stages/key.safetensors.sha256")
    else:
        memory.pipe_file("/stages/key.safetensors", data[:-4] + (b"" if damage == "truncated" else b"1234"))
    calls: list[int] = []

    def compute() -> Any:
        calls.append(1)
        return ARRAYS

    assert arrays_of(Cache(tmp_path / "there", STORE), compute) == EXPECTED
    assert calls == [1]
    assert ("key.safetensors is not as it was stored" in caplog.text) == (damage != "no digest")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["key.safetensors"]
    assert arrays_of(Cache(tmp_path / "third", STORE), not_again) == EXPECTED


def test_storage_that_fails_meanwhile_is_logged_and_the_result_is_here(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_given: Any, **_options: Any) -> NoReturn:
        raise TimeoutError("the line is cut")

    for name in ("put_file", "cat_file"):
        monkeypatch.setattr(type(memory), name, fail)
    cache = Cache(tmp_path, STORE)
    with caplog.at_level(logging.WARNING):
        assert arrays_of(cache, lambda: ARRAYS) == EXPECTED
    assert "key.safetensors cannot be fetched (the line is cut); computing it again" in caplog.text
    assert "key.safetensors cannot be written (the line is cut); only this machine" in caplog.text
    assert arrays_of(cache, not_again) == EXPECTED


@pytest.mark.filterwarnings("ignore")
def test_stage_results_in_s3(s3: Any, tmp_path: Path) -> None:
    store = StageStore(address="s3://shelf/stages")
    store.check()
    assert "Contents" not in s3.list_objects_v2(Bucket="shelf", Prefix="stages/")
    arrays_of(Cache(tmp_path / "here", store), lambda: ARRAYS)
    assert arrays_of(Cache(tmp_path / "there", store), not_again) == EXPECTED
    with pytest.raises(ConfigError, match=r"^--cache s3://none/stages: cannot be written \("):
        StageStore(address="s3://none/stages").check()


def test_storage_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--cache nowhere://x: expected an address such as s3://BUCKET/FOLDER"):
        StageStore(address="nowhere://x").check()


def test_a_compile_goes_on_on_another_machine(
    memory: Any, tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    cache_dir = Path("memory://compiles/one")
    assert store_of(cache_dir) is not None
    config = replace(tiny_inputs("llama"), output=tmp_path / "first", cache_dir=cache_dir, threads=1)
    compile_model(config)
    # The other machine has nothing of its own.
    shutil.rmtree(local_folder(cache_dir))
    progress = Progress()
    compile_model(replace(config, output=tmp_path / "second"), progress)
    assert not {"embed", "distil", "moments", "profile", "sensitivity", "curves"} & progress.stage_seconds.keys()
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
