"""Text of files, folders and the Hub, however it was saved."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from coreinfer.bundles.errors import CalibrationError
from coreinfer.compiler.text.reading import read_texts


def write_json_lines(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_json_lines(name: str, tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / name, [{"text": " first ", "id": 1}, {"text": ""}, {"text": "grüße\n\nzwei"}])
    assert read_texts([path], "text") == ["first", "grüße\n\nzwei"]


def test_text_files_are_parted_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\nline two\r\n\r\n\n\n  sécond \n\n\n".encode())
    assert read_texts([str(tmp_path / "a.txt")], "text") == ["first\nline two", "sécond"]


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["one", None, " ", "two"], "text": [1, 2, 3, 4]})
    assert read_texts([path], "body") == ["one", "two"]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    second = write_json_lines(tmp_path / "b.jsonl", [{"body": "from json"}])
    (tmp_path / "a.md").write_text("from text")
    assert read_texts([second, str(tmp_path / "a.md")], "body") == ["from json", "from text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\n\n{"text": \n', "line 3: no JSON"),
        (
            "a.jsonl",
            b'{"text": "good"}\n{"body": "x", "id": 3}\n',
            "line 2: expected text in field 'text', got fields body, id",
        ),
        ("a.jsonl", b'{"text": 5}\n', "line 1: expected text in field 'text', got a number; take the record out"),
        (
            "a.jsonl",
            b'["a list"]\n',
            "item 1: expected text in field 'text', got text; name the field with --text-field",
        ),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: expected UTF-8, got other bytes"),
        ("a.txt", b"good \xff\xfe", "line 1: expected UTF-8, got other bytes"),
        ("a.txt", b"\n\n \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": " "}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2: expected text in field 'text', got null; take the"),
        ("a.jsonl", b'{"text": true}', "line 1: expected text in field 'text', got true"),
        ("a.jsonl", b'{"text": ["a"]}', "line 1: expected text in field 'text', got an array"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b \\ud800"}',
            r"line 2: field 'text': .* half of one \(.ud800\) at character 3",
        ),
        ("a.jsonl", b'{"text": "a\0"}', "line 1: expected text, got a NUL byte"),
        ("a.txt", b"one\n\ntwo\0", "line 3: expected text, got a NUL byte"),
        ("a.json", b'[{"text": "a"}, {"text": 5}]', "item 2: expected text in field 'text', got a number"),
        ("a.json", b'[{"text": "a"}', "no JSON"),
        ("a.json", b"[]", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"\xef\xbb\xbf\n", "holds no text"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", r"is compressed \(gzip\); unpack it first"),
        ("a.parquet", b"no parquet at all", "cannot be read as Parquet"),
        ("a.parquet", b"", "cannot be read as Parquet"),
    ],
)
def test_unusable_files_are_named_with_the_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_texts([str(path)], "text")
    assert str(caught.value).startswith(f"--calibration {path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["one"], "id": [1]})
    with pytest.raises(CalibrationError, match=r"has no column 'text', only body, id; name it with --text-field"):
        read_texts([path], "text")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file; give builtin, a file, a folder or hf:"):
        read_texts([str(tmp_path / "missing.txt")], "text")


def test_a_folder_stands_for_the_files_of_text_in_it(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n\nthree", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "deeper.txt").mkdir()
    single = tmp_path / "b.txt"
    assert read_texts([str(tmp_path), str(single)], "text") == ["one", "two", "three", "two", "three"]


@pytest.mark.parametrize("name", ["folder", "a.parquet"])
def test_a_folder_without_text_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CalibrationError, match=r"expected files of .*\.jsonl.* in it, found none"):
        read_texts([str(tmp_path / name)], "text")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., object]) -> None:
    """The package datasets is heavy and wants a network."""
    monkeypatch.setitem(sys.modules, "datasets", cast(ModuleType, SimpleNamespace(load_dataset=load_dataset)))


@pytest.mark.parametrize(
    ("source", "name", "split", "field"),
    [
        ("hf:owner/name", "owner/name", "train", "text"),
        ("hf:name:test", "name", "test", "text"),
        ("hf:name:test:body", "name", "test", "body"),
    ],
)
def test_hub_data_sets(source: str, name: str, split: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, **kwargs: str) -> dict[str, list[Any]]:
        assert (args, kwargs) == ((name,), {"split": split})
        return {field: ["one", None, "two"]}

    fake_datasets(monkeypatch, load_dataset)
    assert read_texts([source], "text") == ["one", "two"]


def test_a_hub_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, **kwargs: str) -> object:
        raise FileNotFoundError("Dataset 'x' doesn't exist\nsecond line")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(CalibrationError, match="hf:x: the data set cannot be loaded") as caught:
        read_texts(["hf:x"], "text")
    assert "\n" not in str(caught.value)


def test_hub_data_sets_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", cast(ModuleType, None))
    with pytest.raises(CalibrationError, match="hf:x: needs the package datasets; pip install datasets"):
        read_texts(["hf:x"], "text")


RECORDS = '{"text": "Käse one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", RECORDS.encode("utf-8-sig")),
        ("a.JSONL", RECORDS.encode()),
        ("a.NdJson", RECORDS.encode()),
        ("a.jsonl", RECORDS.replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.jsonl", RECORDS.encode("utf-16")),
        ("a.jsonl", "\ufeff".encode("utf-16-be") + RECORDS.encode("utf-16-be")),
        ("a.json", b'[\n {"text": "K\\u00e4se one"},\n {"text": "two"}\n]\n'),
        ("a.jsonl", '\ufeff[{"text": "Käse one"}, {"text": "two"}]'.encode()),
        ("a.txt", "\ufeffKäse one\r\n\r\ntwo".encode()),
        ("a.TXT", "Käse one\n\ntwo".encode("utf-16")),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_text_is_read_however_it_was_saved(name: str, content: bytes, in_folder: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts([str(tmp_path if in_folder else tmp_path / name)], "text") == ["Käse one", "two"]
