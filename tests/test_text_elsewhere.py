"""Calibration text at addresses: Parquet, JSON Lines and text in S3, and how much of it is read."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles.errors import CalibrationError, ConfigError
from coreinfer.compiler import CompileConfig, Progress
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document
from coreinfer.compiler.text.given import given_documents
from coreinfer.compiler.text.reading import Shard, check_elsewhere, read_order, read_shard, read_texts, text_sources

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


def given(source: str, **options: Any) -> list[Document]:
    config = make_config(calibration=(source,), document_tokens=64, **options)
    return given_documents(config, Alone(load("llama")), Progress())


def test_documents_are_those_of_the_same_files_here(in_memory: str, folder: Path) -> None:
    for seed in range(3):
        assert given(in_memory, seed=seed) == given(str(folder), seed=seed)


@pytest.fixture
def many(in_memory: str) -> str:
    """A folder of 100 files of one text each, at an address."""
    for number in range(100):
        text = f"{number} {TEXTS[number % len(TEXTS)]}"
        fsspec.filesystem("memory").pipe_file(f"/many/{number:02}.txt", text.replace("\n\n", " ").encode())
    return in_memory.replace("text", "many")


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, as they are."""
    names: list[str] = []

    def watched(shard: Shard, text_field: str) -> list[str]:
        names.append(shard.source)
        return read_shard(shard, text_field)

    monkeypatch.setattr("coreinfer.compiler.text.corpus.read_shard", watched)
    return names


def test_of_many_files_no_more_are_read_than_enough(many: str, num_read: list[str]) -> None:
    whole = given(many, calibration_tokens=10**6)
    assert len(num_read) == 100
    found, read = {}, {}
    for seed in (1, 2):
        num_read.clear()
        found[seed] = given(many, calibration_tokens=400, seed=seed)
        read[seed] = [*num_read]
    for seed, documents in found.items():
        assert 16 <= len(read[seed]) < 60
        assert sum(len(document.token_ids) for document in documents) >= 4 * 400
        # They stand in the order of the files.
        assert [document for document in whole if document in documents] == documents
    assert {*read[1]} != {*read[2]}
    assert given(many, calibration_tokens=400, seed=1) == found[1]
    # One file with enough text is not enough, and healing takes what is left.
    for num_tokens, heal_steps, expected in ((1, 0, 16), (400, 1, 100)):
        num_read.clear()
        given(many, calibration_tokens=num_tokens, heal_steps=heal_steps)
        assert len(num_read) == expected


def test_of_many_files_those_that_are_read_first_are_looked_at_before_the_model_is_loaded(
    many: str, tiny_inputs: Callable[[str], CompileConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr("coreinfer.compiler.checks.check_elsewhere", lambda source, _field: looked_at.append(source))
    inputs = find_inputs(replace(tiny_inputs("llama"), calibration=(many,), seed=3))
    assert len(inputs.texts) == 100
    assert looked_at == read_order(inputs.texts, 3)[:64]
