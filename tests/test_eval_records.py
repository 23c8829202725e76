"""What evaluation data means, and what is said of data that means nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles import ConfigError
from coreinfer.evaluation.records import read_datasets


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_the_name_tells_the_kind(tmp_path: Path) -> None:
    pair = {"context": "two and two are", "continuation": "four", "aliases": ["4", "four"]}
    write(tmp_path / "lm_a.jsonl", {"text": "one"})
    write(tmp_path / "code_a.jsonl", {"context": "def f():\n", "continuation": "    return 1", "entry_point": "f"})
    write(tmp_path / "completion_a.jsonl", pair)
    write(tmp_path / "ie_a.jsonl", pair)
    write(tmp_path / "summarization_a.jsonl", {"context": "long", "summary": "short"})
    write(tmp_path / "translation_a.jsonl", pair)
    write(tmp_path / "prompts_a.jsonl", {"prompt": "why?"})
    found = {dataset.name: dataset for dataset in read_datasets([str(tmp_path)])}
    kinds = {name.split("_")[0]: dataset.kind for name, dataset in found.items()}
    assert kinds == {
        "lm": "text",
        "code": "text",
        "completion": "completion",
        "ie": "entities",
        "summarization": "summarization",
        "translation": "translation",
        "prompts": "prompt",
    }
    assert found["code_a"].items[0].context == "def f():\n    return 1"
    assert found["completion_a"].items[0].answers == ("four", "4")
    assert found["summarization_a"].items[0].answers == ("short",)


def test_choices_follow_their_context(tmp_path: Path) -> None:
    plain = {"query": "Sky is", "choices": ["blue", "green"], "gold": 0}
    partial = {"query": "", "choices": ["a x", "b x"], "gold": 1, "context_options": ["a", "b"], "continuation": "x"}
    (dataset,) = read_datasets([write(tmp_path / "mc_a.jsonl", plain, partial)])
    assert dataset.items[0].contexts == ("Sky is", "Sky is")
    assert dataset.items[0].answers == (" blue", " green")
    assert dataset.items[1].contexts == ("a", "b")
    assert dataset.items[1].answers == (" x", " x")
    assert dataset.items[1].gold == 1


def test_as_text_joins(tmp_path: Path) -> None:
    path = write(tmp_path / "completion_a.jsonl", {"context": "two and two are", "continuation": "four"})
    (dataset,) = read_datasets([path], as_text=True)
    assert (dataset.kind, dataset.items[0].context) == ("text", "two and two are four")


def test_a_limit_takes_items_from_all_over(tmp_path: Path) -> None:
    path = write(tmp_path / "lm_a.jsonl", *({"text": str(number)} for number in range(11)))
    (dataset,) = read_datasets([path], limit=3)
    assert [item.context for item in dataset.items] == ["0", "5", "10"]
    (dataset,) = read_datasets([path], limit=99)
    assert len(dataset.items) == 11


def test_a_pattern_and_a_file_named_twice(tmp_path: Path) -> None:
    write(tmp_path / "lm_a.jsonl", {"text": "one"})
    write(tmp_path / "lm_b.jsonl", {"text": "one"})
    found = read_datasets([str(tmp_path / "lm_*"), str(tmp_path / "lm_a.jsonl")])
    assert [dataset.name for dataset in found] == ["lm_a", "lm_b"]


def test_all_that_is_wrong_is_named(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "other_a.jsonl", {"text": "one"}),
        write(tmp_path / "lm_a.jsonl", {"text": "one"}, {"words": "two"}),
        write(tmp_path / "mc_a.jsonl", {"query": "q", "choices": ["a"], "gold": 1}),
        write(tmp_path / "completion_a.jsonl", {"context": 1, "continuation": "b"}),
        write(tmp_path / "lm_b.jsonl"),
        str(tmp_path / "absent"),
    ]
    with pytest.raises(ConfigError) as caught:
        read_datasets(paths)
    message = str(caught.value)
    assert "other_a.jsonl: expected a name that begins with lm_" in message
    assert "lm_a.jsonl line 2: not a record of its kind (no field 'text')" in message
    assert "mc_a.jsonl line 1: not a record of its kind (gold: expected 0 to 0, got 1)" in message
    assert "completion_a.jsonl line 1: not a record of its kind (expected texts" in message
    assert "lm_b.jsonl: expected at least one line" in message
    assert "found nothing" in message


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "lm_a.jsonl"
    path.write_bytes(b"text \xff\xfe")
    with pytest.raises(ConfigError, match="line 1: expected UTF-8, got other bytes"):
        read_datasets([str(path)])


ITEMS = '{"text": "Käse one"}\n\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lm_a.jsonl", ITEMS.encode("utf-8-sig")),
        ("lm_a.JSONL", ITEMS.encode()),
        ("lm_a.jsonl", ITEMS.replace("\n", "\r\n").encode("utf-16")),
        ("lm_a.jsonl", '[{"text": "Käse one"},\n{"text": "two"}]'.encode()),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_records_are_read_however_they_were_saved(name: str, content: bytes, in_folder: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (dataset,) = read_datasets([str(tmp_path if in_folder else tmp_path / name)])
    assert [item.context for item in dataset.items] == ["Käse one", "two"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\n{"text": "\\udc00"}', r"lm_a.jsonl line 2: .* half of one \(.udc00\) at character 1; take it out"),
        (b'{"text": null}', "lm_a.jsonl line 1: .*expected texts"),
        (b'{"text": "a"}\n{', "lm_a.jsonl: line 2: no JSON"),
        (b'{"text": "a\0"}', "lm_a.jsonl: line 1: expected text, got a NUL byte"),
        (b"\x1f\x8b\x08", r"lm_a.jsonl: is compressed \(gzip\)"),
        (b"[7]", "lm_a.jsonl item 1: not a record of its kind"),
        (b"[]", "expected at least one line, got an empty file"),
    ],
)
def test_records_that_are_none_are_named_with_their_place(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "lm_a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_datasets([str(tmp_path)])
    assert "\n" not in str(caught.value)
