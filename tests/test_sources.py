import hashlib
import importlib
import os
import sys
from pathlib import Path

import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler.models import sources
from coreinfer.compiler.models.sources import ModelSource, default_encoder, find_source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python package that ships a GGUF file and a folder, beside a file outside of it."""
    folder = tmp_path / "site" / "shipped_model"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "weights" / "tiny.gguf").write_bytes(b"GGUF")
    (folder.parent / "outside.gguf").write_bytes(b"GGUF")
    (folder.parent / "plain_module.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "shipped_model", raising=False)
    return "shipped_model"


def test_a_file_in_a_package(package: str, tmp_path: Path) -> None:
    source = find_source(f"package:{package}/weights/tiny.gguf")
    assert source.name == "package:shipped_model/weights/tiny.gguf"
    assert source.path == (tmp_path / "site" / package / "weights" / "tiny.gguf").resolve()
    assert source.gguf_path == source.path


@pytest.mark.parametrize("inner", ["/weights", "", "/"])
def test_a_folder_in_a_package(inner: str, package: str) -> None:
    source = find_source(f"package:{package}{inner}")
    assert source.path is not None
    assert source.path.is_dir()


@pytest.mark.parametrize(
    "inner", ["../outside.gguf", "weights/../../outside.gguf", "{site}/outside.gguf", "missing.gguf"]
)
def test_nothing_outside_a_package_is_found(inner: str, package: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no .*; it ships weights/tiny.gguf"):
        find_source(f"package:{package}/{inner.format(site=tmp_path / 'site')}")


def test_links_out_of_a_package_are_refused(package: str, tmp_path: Path) -> None:
    (tmp_path / "site" / package / "link.gguf").symlink_to(tmp_path / "site" / "outside.gguf")
    with pytest.raises(ConfigError, match=r"has no .link\.gguf."):
        find_source(f"package:{package}/link.gguf")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", ["no_such_package", "no_such.inner", "plain_module", ".relative", "", "a b", "."])
def test_missing_packages(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no Python package .* is installed; pip install it first") as caught:
        find_source(f"package:{name}/model.gguf", option="--encoder")
    assert str(caught.value).startswith(f"--encoder package:{name}/model.gguf: ")


def test_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    source = find_source(str(tmp_path / "tiny"))
    assert (source.name, source.location, source.gguf_file) == ("tiny", str(tmp_path / "tiny"), None)
    assert source.path == tmp_path / "tiny"


def test_names_of_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert find_source(".").name == "tiny"
    assert find_source("../tiny/").name == "tiny"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_source("~/tiny").path == tmp_path / "tiny"


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    source = find_source(str(tmp_path / "model.gguf"))
    assert source == ModelSource(name="model.gguf", location=str(tmp_path), gguf_file="model.gguf")
    assert source.path == tmp_path / "model.gguf"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"expected a folder or a .gguf file, got another file"):
        find_source(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("spec", ["owner/name", "gpt2"])
def test_hub_ids(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = find_source(spec)
    assert source == ModelSource(name=spec, location=spec)
    assert source.path is None


@pytest.mark.parametrize("spec", ["./missing", "../missing", "~/missing", "/missing", "missing.gguf", "a/b/c"])
def test_missing_files_are_no_hub_ids(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder; give a Hub id") as caught:
        find_source(spec, option="--encoder")
    assert str(caught.value).startswith(f"--encoder {spec}: ")


def model_folder(folder: Path) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("read me")
    return folder


def test_the_hash_of_a_folder_is_that_of_what_is_in_it(tmp_path: Path) -> None:
    first, second = (find_source(str(model_folder(tmp_path / name))) for name in ("a", "b"))
    assert first.sha256({}) == second.sha256({})
    (tmp_path / "b" / "README.md").write_text("changed")
    assert first.sha256({}) == second.sha256({})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "1_Pooling/config.json"])
def test_the_hash_of_a_folder_follows_every_file_that_shapes_the_model(name: str, tmp_path: Path) -> None:
    source = find_source(str(model_folder(tmp_path / "model")))
    before = source.sha256({})
    (tmp_path / "model" / name).write_text("other")
    changed = source.sha256({})
    assert changed != before
    os.rename(tmp_path / "model" / name, tmp_path / "model" / "other.json")
    assert source.sha256({}) not in (before, changed)


def test_the_hash_of_a_gguf_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.gguf").write_bytes(b"other")
    assert find_source(str(tmp_path / "model.gguf")).sha256({}) == hashlib.sha256(b"GGUF").hexdigest()


def test_the_hash_of_a_hub_model_follows_its_id_and_config() -> None:
    source = find_source("owner/name")
    assert source.sha256({"a": 1, "b": 2}) == source.sha256({"b": 2, "a": 1})
    assert source.sha256({"a": 1}) != source.sha256({"a": 2})
    assert source.sha256({"a": 1}) != find_source("owner/other").sha256({"a": 1})


def test_the_default_encoder_is_the_package_where_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEFAULT_ENCODER_PACKAGE", "no_such_package")
    assert default_encoder().location == "sentence-transformers/all-MiniLM-L6-v2"
    (Path(next(iter(importlib.import_module(package).__path__))) / "model").mkdir()
    monkeypatch.setattr(sources, "DEFAULT_ENCODER_PACKAGE", package)
    assert default_encoder().path is not None
