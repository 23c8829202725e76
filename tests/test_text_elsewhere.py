"""Calibration text at addresses: Parquet, JSON Lines and text in S3, read by the places of a team."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles.errors import CalibrationError, ConfigError
from coreinfer.compiler import CompileConfig, Progress
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.team.team import Pending
from coreinfer.compiler.text.given import given_documents
from coreinfer.compiler.text.reading import check_elsewhere, read_texts, text_sources

from .model_factory import corpus_texts
from .test_carrying import load
from .test_config import make_config
from .test_web_bundles import s3

fsspec = pytest.importorskip("fsspec")
pyarrow = pytest.importorskip("pyarrow")

__all__ = ["s3"]

TEXTS = corpus_texts()[:12]


def write_folder(folder: Path) -> Path:
    """A Parquet file of three row groups, JSON Lines, a text, and something else."""
    import pyarrow.parquet

    folder.mkdir(parents=True)
    table = pyarrow.table({"text": TEXTS[:7], "id": [*range(7)]})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=3)
    lines = [f'{{"text": {text!r}}}'.replace("'", '"') for text in ("one line", "another line")]
    (folder / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "c.txt").write_text("\n\n".join(text.replace("\n\n", " ") for text in TEXTS[7:]), encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "text")


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    """The same folder at an address."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in folder.iterdir():
        files.pipe_file(f"/text/{path.name}", path.read_bytes())
    yield "memory://text"
    files.store.clear()


@pytest.mark.filterwarnings("ignore")
def test_text_in_s3_is_that_of_the_same_files_here(s3: Any, folder: Path) -> None:
    for path in folder.iterdir():
        s3.upload_file(str(path), "shelf", f"deep/text/{path.name}")
    expected = read_texts([str(folder)], "text")
    for source in ("s3://shelf/deep/text", "s3://shelf/deep/text/", "s3://shelf/deep/*/*"):
        assert read_texts([source], "text") == expected
    assert text_sources(["s3://shelf/deep/text/*.jsonl"]) == ["s3://shelf/deep/text/b.jsonl"]
    assert read_texts(["s3://shelf/deep/text/a.parquet"], "text") == [text.strip() for text in TEXTS[:7]]
    for source in ("s3://shelf/none.parquet", "s3://none/text"):
        with pytest.raises(CalibrationError, match=rf"^--calibration {source}: cannot be read \("):
            read_texts([source], "text")


def test_a_pattern_stands_for_the_files_that_it_finds(folder: Path) -> None:
    assert text_sources([f"{folder}/[ab].*"]) == [str(folder / "a.parquet"), str(folder / "b.jsonl")]
    with pytest.raises(CalibrationError, match=r"expected files of .* in it, found none"):
        text_sources([f"{folder}/*.png"])


def test_columns_are_checked_before_anything_is_loaded(in_memory: str) -> None:
    check_elsewhere(f"{in_memory}/a.parquet", "text")
    with pytest.raises(CalibrationError, match=r"a\.parquet: has no column 'body', only text, id; name it with"):
        check_elsewhere(f"{in_memory}/a.parquet", "body")
    with pytest.raises(CalibrationError, match=r"b\.jsonl: line 1: expected text in field 'body', got fields text"):
        read_texts([f"{in_memory}/b.jsonl"], "body")
    fsspec.filesystem("memory").pipe_file("/text/a.parquet", b"PAR1 no more")
    with pytest.raises(CalibrationError, match=r"memory://text/a\.parquet: cannot be read as Parquet \("):
        check_elsewhere(f"{in_memory}/a.parquet", "text")


@pytest.mark.parametrize("source", ["memory://nothing", "memory://text/*.csv"])
def test_an_address_without_text_is_refused(source: str, in_memory: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^--calibration {source.replace('*', '.')}: "):
        text_sources([source])


def test_storage_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--calibration nowhere://x: expected an address such as s3://BUCKET"):
        text_sources(["nowhere://x"])


def test_the_package_of_another_kind_of_storage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether it is installed or not.
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"^--calibration gs://x/y: .*gcsfs") as caught:
        text_sources(["gs://x/y"])
    assert "coreinfer[remote]" not in str(caught.value)


def test_documents_are_the_same_whoever_reads_them(in_memory: str, folder: Path) -> None:
    def documents(source: str, size: int) -> tuple[Any, list[int]]:
        team, places = Alone(load("llama"), size), list[int]()
        call = team.call

        def watch(place: int, stage: str, task: Callable[..., Any], *arguments: object) -> Pending[Any]:
            places.append(place)
            return call(place, stage, task, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(team, "call", watch)
            return given_documents(config_of(source), team, Progress()), places

    def config_of(source: str) -> CompileConfig:
        return make_config(calibration=(source,), document_tokens=64)

    expected, here = documents(str(folder), 3)
    # What lies on this machine is read by the main process.
    assert here == []
    for size, places in ((1, [0] * 5), (3, [0, 1, 2, 0, 1])):
        # Three row groups, and two files.
        assert documents(in_memory, size) == (expected, places)
