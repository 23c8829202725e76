import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles.errors import BundleCorrupt, BundleNotFound, BundleVersionError
from coreinfer.bundles.manifest import FileRecord, Manifest, content_sha256, read_manifest, write_manifest
from coreinfer.bundles.versions import READ_VERSIONS, SCHEMA_VERSION
from hypothesis import given, settings
from hypothesis import strategies as st

from .bundle_factory import as_version_2, edit_manifest, make_manifest

RECORDS = ("model", "router", "plan", "quality", "provenance")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds nothing but a sound manifest."""
    write_manifest(tmp_path / "manifest.json", make_manifest())
    return tmp_path


def corruption(folder: Path) -> str:
    """The message with which the manifest is refused: one line that names the file and says what to do."""
    with pytest.raises(BundleCorrupt) as caught:
        read_manifest(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "manifest.json"))
    assert message.endswith("compile the bundle again")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "manifest",
    [
        make_manifest(),
        make_manifest(gated=False, ffn_bias=True, dense=False, ffn_format="f32"),
        replace(make_manifest(), quality=None, files={"base.safetensors": FileRecord(sha256="ef" * 32, bytes=7)}),
        replace(make_manifest(), router=replace(make_manifest().router, agreement=None)),
    ],
    ids=["gated", "ungated", "no-quality", "no-agreement"],
)
def test_a_manifest_comes_back_equal(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path / "manifest.json", manifest)
    assert read_manifest(tmp_path) == manifest


def test_a_float_written_as_an_integer_comes_back_as_a_float(folder: Path) -> None:
    with edit_manifest(folder) as data:
        data["plan"]["keep"] = 1
    keep = read_manifest(folder).plan.keep
    assert (type(keep), keep) == (float, 1.0)


def test_fields_that_this_version_does_not_know_are_ignored(folder: Path) -> None:
    with edit_manifest(folder) as data:
        data["plan"]["of_another_version"] = {"anything": [1, None]}
    assert read_manifest(folder) == make_manifest()


def test_a_value_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    manifest = replace(make_manifest(), router=replace(make_manifest().router, distance_p99=float("nan")))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(tmp_path / "manifest.json", manifest)


def required_fields() -> list[tuple[str, ...]]:
    data = asdict(make_manifest())
    top = [(name,) for name in data if name not in ("files", "schema_version", "token_shares")]
    # Bundles of before know no experts, and most list none.
    optional = {"experts", "layer_experts"}
    return [*top, *((record, name) for record in RECORDS for name in data[record] if name not in optional)]


@pytest.mark.parametrize("path", required_fields(), ids=".".join)
def test_a_missing_field_is_named(folder: Path, path: tuple[str, ...]) -> None:
    with edit_manifest(folder) as data:
        record = data if len(path) == 1 else data[path[0]]
        del record[path[-1]]
    assert f"manifest.{'.'.join(path)}: missing" in corruption(folder)


WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("model.num_layers", "2", "expected int, got str '2'"),
    ("model.num_layers", 2.0, "expected int, got float '2.0'"),
    ("model.num_layers", True, "expected int, got bool 'True'"),
    ("model.name", None, "expected str, got NoneType"),
    ("model.gated", 1, "expected bool, got int '1'"),
    ("model.config", [], "expected dict, got list"),
    ("plan.keep", True, "expected float, got bool 'True'"),
    ("plan.keep", "0.5", "expected float, got str '0.5'"),
    ("plan.keep", float("nan"), "expected float, got float 'nan'"),
    ("plan.keep", float("-inf"), "expected float, got float '-inf'"),
    ("plan.keep", 10**400, "expected float, got int '1000"),
    ("plan.selection", "magic", "expected output-aware, coreinfer, griffin, got 'magic'"),
    ("plan.selection", ["griffin"], "expected output-aware, coreinfer, griffin, got ['griffin']"),
    ("plan.layer_budgets", {"0": 96}, "expected tuple, got dict"),
    ("plan.layer_budgets", [96, "50"], "manifest.plan.layer_budgets[1]: expected int, got str '50'"),
    ("plan.ridges", [None, "x"], "manifest.plan.ridges[1]: expected float, got str 'x'"),
    ("router.agreement", "high", "expected float, got str 'high'"),
    ("quality", [], "manifest.quality: expected an object, got list"),
    ("quality.clusters.kl", "0.5", "manifest.quality.clusters.kl: expected float"),
    ("clusters", [17], "manifest.clusters[0]: expected an object, got int"),
    ("provenance.packages", {"numpy": 2}, "manifest.provenance.packages.numpy: expected str, got int '2'"),
    ("base_tensors", {"w": {"dtype": "F32"}}, "manifest.base_tensors.w.shape: missing"),
    ("files", {"base.safetensors": {"sha256": 1, "bytes": 2}}, "manifest.files.base.safetensors.sha256: expected str"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_TYPES, ids=lambda part: str(part)[:20])
def test_a_wrong_type_is_named(folder: Path, path: str, value: Any, message: str) -> None:
    with edit_manifest(folder) as data:
        *parents, name = path.split(".")
        for parent in parents:
            data = data[parent]
        data[name] = value
    problem = corruption(folder)
    assert f"manifest.{path}" in problem
    assert message in problem


def test_several_problems_are_all_named(folder: Path) -> None:
    with edit_manifest(folder) as data:
        del data["model"]["family"], data["router"]
        data["plan"]["keep"] = "half"
        data["clusters"][1]["examples"] = ["fine", 3]
    message = corruption(folder)
    assert "4 problems: (1) " in message
    for name in (
        "model.family: missing",
        "router: missing",
        "plan.keep: expected",
        "clusters[1].examples[1]: expected",
    ):
        assert f"manifest.{name}" in message


def test_unknown_formats_and_groups_without_a_format_are_all_named(folder: Path) -> None:
    with edit_manifest(folder) as data:
        data["quantization"]["ffn"]["format"] = "int3"
        data["quantization"]["head"]["format"] = "gguf"
        del data["quantization"]["norm"]
    message = corruption(folder)
    assert "manifest.quantization.ffn: format 'int3', this coreinfer reads bf16, f32" in message
    assert "manifest.quantization.head: format 'gguf'" in message
    assert "manifest.quantization.norm: missing" in message


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (max(READ_VERSIONS) + 1, "upgrade coreinfer"),
        (SCHEMA_VERSION - 2, "compile the bundle again"),
        (None, "compile the bundle again"),
        ("2", "compile the bundle again"),
    ],
)
def test_another_schema_version_says_what_to_do(folder: Path, version: object, advice: str) -> None:
    with edit_manifest(folder) as data:
        data["schema_version"] = version
        del data["plan"]  # What else differs in another version is no problem of its own.
    with pytest.raises(BundleVersionError) as caught:
        read_manifest(folder)
    known = "this coreinfer reads 2, 3, 4, 5, 6 and 7"
    assert READ_VERSIONS == (2, 3, 4, 5, 6, 7)
    assert f"schema version {version!r}, {known}; {advice}" in str(caught.value)


def test_a_bundle_of_version_2_is_read(folder: Path) -> None:
    expected = read_manifest(folder)
    with edit_manifest(folder) as data:
        as_version_2(data)
    assert read_manifest(folder) == expected


def test_a_damaged_bundle_of_version_2_is_named(folder: Path) -> None:
    with edit_manifest(folder) as data:
        as_version_2(data)
        data["clusters"][1] = 7
        data["plan"]["layer_budgets"] = "all"
    message = corruption(folder)
    assert "manifest.clusters[1]: expected an object, got int" in message
    assert "manifest.plan.layer_budgets: expected tuple, got str" in message
    with edit_manifest(folder) as data:
        del data["plan"], data["clusters"]
    assert "manifest.clusters" in corruption(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\x00\xff\xfe\x80binary", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"9" * 10_000, "cannot be read as JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b'"text"', "expected a JSON object, got str"),
        (b"null", "expected a JSON object, got NoneType"),
    ],
    ids=["empty", "cut", "binary", "deep", "long-number", "list", "string", "null"],
)
def test_a_file_that_is_no_json_object_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert message in corruption(folder)


def test_a_manifest_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    assert "cannot be read" in corruption(tmp_path)


def test_no_bundle_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, reason in [("absent", "does not exist"), ("file", "is a file"), ("empty", "has no manifest.json")]:
        with pytest.raises(BundleNotFound, match=f"{re.escape(str(tmp_path / name))} .*{re.escape(reason)}"):
            read_manifest(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([path for path in required_fields() if path[-1] != "config"]), json_values)
def test_any_value_in_any_field_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[str, ...], value: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    data = asdict(make_manifest())
    record = data if len(path) == 1 else data[path[0]]
    record[path[-1]] = value
    data["sha256"] = content_sha256(data)
    (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    assert problem_or_equal(folder, path, value) in (None, f"manifest.{path[0]}")


def problem_or_equal(folder: Path, path: tuple[str, ...], value: Any) -> str | None:
    """None when a manifest is read with that value in that field, else the part of the message that names the field."""
    try:
        manifest = asdict(read_manifest(folder))
    except BundleCorrupt as error:
        name = f"manifest.{path[0]}"
        return name if name in str(error) else str(error)
    got = manifest[path[0]] if len(path) == 1 else manifest[path[0]][path[-1]]
    return None if json.loads(json.dumps(got)) == value else f"{path} came back as {got!r}"


def test_a_changed_value_is_noticed(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.json", make_manifest())
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert '"hidden_size": 64' in text
    (tmp_path / "manifest.json").write_text(text.replace('"hidden_size": 64', '"hidden_size": 65'), encoding="utf-8")
    with pytest.raises(BundleCorrupt, match="do not match its own checksum"):
        read_manifest(tmp_path)
