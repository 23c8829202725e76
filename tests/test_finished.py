"""Whole bundles in the cache: the same again is a copy, and anything that would change a bundle is another one."""

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from coreinfer.bundles import BundleError, open_bundle
from coreinfer.bundles.checksums import file_sha256
from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler import CompileConfig, Progress, compile_model, finished, program
from coreinfer.compiler.checks import Inputs, find_inputs
from coreinfer.compiler.finished import identify
from coreinfer.compiler.models import load, source_files
from coreinfer.compiler.models.primitives import PRIMITIVES_VARIABLE
from coreinfer.compiler.models.sources import ModelSource

from .test_pipeline import contents
from .test_refusals import check_light, outcome


@pytest.fixture
def inputs(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> CompileConfig:
    """Options of a tiny compile with a cache, whose files a test may change."""
    config = tiny_inputs("llama")
    places = {"model": config.model, "encoder": str(config.encoder), "calibration": config.calibration[0]}
    for name, place in places.items():
        (tmp_path / name).mkdir()
        copy = tmp_path / name / Path(place).name
        places[name] = str(shutil.copytree(place, copy) if Path(place).is_dir() else shutil.copy(place, copy))
    return replace(
        config,
        model=places["model"],
        encoder=places["encoder"],
        calibration=(places["calibration"],),
        output=tmp_path / "bundle",
        cache_dir=tmp_path / "cache",
        threads=1,
    )


@pytest.fixture(scope="module")
def compiled_once(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> CompileConfig:
    """A compile with a cache, whose files stay as they are; without controls, which take time."""
    folder = tmp_path_factory.mktemp("compiled")
    config = replace(tiny_inputs("llama"), output=folder / "bundle", cache_dir=folder / "cache", threads=1)
    config = replace(config, evaluate=False, controls=False)
    compile_model(config)
    return config


@pytest.fixture
def compiled(compiled_once: CompileConfig, tmp_path: Path) -> CompileConfig:
    """The same with its bundle and cache, which share their files, in the test's own folder."""
    subprocess.run(["cp", "-a", f"{compiled_once.output.parent}/.", str(tmp_path)], check=True)
    return replace(compiled_once, output=tmp_path / "bundle", cache_dir=tmp_path / "cache")


def stages(config: CompileConfig) -> list[str]:
    progress = Progress()
    compile_model(config, progress)
    return list(progress.stage_seconds)


def key_of(config: CompileConfig) -> str:
    key = identify(config, find_inputs(config)).key
    assert key is not None
    return key


def test_the_same_command_again_is_a_copy(compiled: CompileConfig, tmp_path: Path) -> None:
    again = replace(compiled, output=tmp_path / "again")
    assert stages(again) == ["hash", "copy"]
    assert contents(tmp_path / "again") == contents(tmp_path / "bundle")
    assert not [*(tmp_path / "cache").glob(".*")]
    open_bundle(tmp_path / "again")
    # The place of the old one is taken only on demand.
    with pytest.raises(BundleError, match="again exists; give another -o or add --force"):
        compile_model(again)
    assert stages(replace(again, force=True)) == ["hash", "copy"]
    shutil.rmtree(tmp_path / "bundle")
    assert stages(compiled) == ["hash", "copy"]


def test_a_bundle_is_found_by_the_number_of_workers(inputs: CompileConfig) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    alone = key_of(inputs)
    assert key_of(replace(inputs, ray="local", workers=1)) == alone
    assert key_of(replace(inputs, ray="local", workers=2)) != alone
    # Not by where they are.
    two = replace(inputs, ray="local", workers=2, threads=1)
    assert key_of(replace(two, ray="auto")) == key_of(two)


def test_the_same_command_again_imports_nothing_heavy(compiled: CompileConfig, tmp_path: Path) -> None:
    options: list[object] = [
        "--clusters",
        "4",
        "--keep",
        "0.67",
        "--dtype",
        "float32",
        "--budgets",
        "uniform",
        "--quantize",
        "bf16",
    ]
    given: list[object] = [
        "--model",
        compiled.model,
        "--encoder",
        compiled.encoder,
        "--calibration",
        compiled.calibration[0],
    ]
    given += ["--no-evaluate", "--no-controls", "--threads", 1, "--cache", tmp_path / "cache", *options]
    found = outcome("compile", *given, "-o", tmp_path / "again")
    assert (found["code"], contents(tmp_path / "again")) == (0, contents(tmp_path / "bundle"))
    assert "clusters" in found["stdout"]
    check_light(found, 2.0)


def test_bundles_share_nothing(compiled: CompileConfig, tmp_path: Path) -> None:
    whole = contents(tmp_path / "bundle")
    compile_model(replace(compiled, output=tmp_path / "second"))
    for path in (tmp_path / "second").rglob("*.*"):
        path.write_bytes(b"changed where it is")
    assert contents(tmp_path / "bundle") == whole
    compile_model(replace(compiled, output=tmp_path / "third"))
    assert contents(tmp_path / "third") == whole


@pytest.mark.parametrize("name", [LAYOUT.base, LAYOUT.report, LAYOUT.manifest, LAYOUT.cluster(2)])
@pytest.mark.parametrize("missing", [False, True])
def test_what_was_damaged_is_compiled_again(
    name: str, missing: bool, compiled: CompileConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = contents(tmp_path / "bundle")
    # The cache has the same file, not a copy: as if the user had written into it.
    (entry,) = (tmp_path / "cache").glob("bundle-*")
    if missing:
        (entry / name).unlink()
    else:
        with (entry / name).open("r+b") as file:
            file.seek(100)
            file.write(b"~")
    assert "write" in stages(replace(compiled, output=tmp_path / "again"))
    assert f"cache folder {entry} cannot be used" in caplog.text
    assert contents(tmp_path / "again") == whole
    assert stages(replace(compiled, output=tmp_path / "third")) == ["hash", "copy"]
    assert contents(tmp_path / "third") == whole


CHANGES: dict[str, dict[str, Any]] = {
    "clusters": {"clusters": 3},
    "keep": {"keep": 0.5},
    "seed": {"seed": 1},
    "quantize": {"quantize": "int8"},
    "head": {"head_quantize": "int8"},
    "dense": {"dense": False},
    "report": {"report_sentences": 3},
    "threads": {"threads": 2},
    "memory": {"max_memory": 4.0},
    "controls": {"controls": False},
    "heal": {"heal_steps": 1},
    "tokens": {"calibration_tokens": 2000},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_options_are_another_bundle(name: str, inputs: CompileConfig) -> None:
    assert key_of(replace(inputs, **CHANGES[name])) != key_of(inputs)


def test_places_and_force_are_not(inputs: CompileConfig, tmp_path: Path) -> None:
    moved = replace(inputs, output=tmp_path / "elsewhere", force=True, cache_dir=tmp_path / "other-cache")
    assert key_of(moved) == key_of(inputs)


def _write(path: str | Path, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


def _change_model(config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(Path(config.model) / "generation_config.json", "{}")


def _change_encoder(config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(Path(str(config.encoder)) / "1_Pooling" / "config.json", "{}")


def _change_text(config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(config.calibration[0], Path(config.calibration[0]).read_text(encoding="utf-8") + "\n\nOne more text.")


def _change_package(config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "version", lambda name: "9.9")


def _change_program(config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(finished.__file__).parent / "report" / "page" / "page.css"
    monkeypatch.setattr(program, "file_sha256", lambda path: "other" if path == page else file_sha256(path))


def _change_arithmetic(config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "bf16_products_are_faster", lambda: "other")


def _change_environment(config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.mark.parametrize(
    "change",
    [
        _change_model,
        _change_encoder,
        _change_text,
        _change_package,
        _change_program,
        _change_arithmetic,
        _change_environment,
    ],
)
def test_what_shapes_a_bundle_is_another_bundle(
    change: Callable[[CompileConfig, pytest.MonkeyPatch], None], inputs: CompileConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key_of(inputs)
    assert key_of(inputs) == before
    change(inputs, monkeypatch)
    assert key_of(inputs) != before


@pytest.mark.parametrize(
    "name",
    # Set by the command, by llama.cpp (in C, so that only processes begun after it see it), and twice by scikit-learn.
    [PRIMITIVES_VARIABLE, "KMP_BLOCKTIME", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"],
)
def test_what_libraries_set_as_they_run_is_none(
    name: str, inputs: CompileConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    before = key_of(inputs)
    monkeypatch.setenv(name, "7")
    assert key_of(inputs) == before


def test_a_new_file_in_a_folder_of_text_is_another_bundle(inputs: CompileConfig, tmp_path: Path) -> None:
    folder = replace(inputs, calibration=(str(tmp_path / "calibration"),))
    before = key_of(folder)
    _write(tmp_path / "calibration" / "more.txt", "more text")
    assert key_of(folder) != before


def test_threads_are_those_that_torch_will_have(inputs: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(inputs, threads=None)
    with_torch = key_of(config)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr(finished, "usable_cores", lambda: 8)
    assert key_of(config) != with_torch


def test_what_may_change_on_the_hub_is_read_again(inputs: CompileConfig) -> None:
    local, hub = ModelSource(name="m", location=inputs.model), ModelSource(name="a/b", location="a/b")
    found = Inputs(model=local, encoder=local, texts=("builtin",))
    assert identify(inputs, found).key is not None
    for other in ({"texts": ("builtin", "hf:some/thing")}, {"encoder": hub}, {"model": hub}):
        assert identify(inputs, replace(found, **other)).key is None
    of_hub = replace(found, model=hub)
    keys = {identify(inputs, of_hub, {"model_type": "llama", "revision": revision}).key for revision in "ab"}
    assert len(keys - {None}) == 2


def test_the_revision_of_a_model_on_the_hub(monkeypatch: pytest.MonkeyPatch, inputs: CompileConfig) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(
        source_files, "cached_file", lambda *_, **__: f"/hub/models--a--b/snapshots/{commit}/config.json"
    )
    assert load.hub_revision(ModelSource(name="a/b", location="a/b")) == commit
    assert load.hub_revision(ModelSource(name="m", location=inputs.model)) is None
    monkeypatch.setattr(source_files, "cached_file", lambda *_, **__: None)
    assert load.hub_revision(ModelSource(name="a/b", location="a/b")) is None


def test_without_a_cache_nothing_is_kept(inputs: CompileConfig, tmp_path: Path) -> None:
    config = replace(inputs, cache_dir=None, evaluate=False)
    compile_model(config)
    assert "load" in stages(replace(config, output=tmp_path / "again"))
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_keep_a_bundle_costs_nothing_else(
    inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = replace(inputs, evaluate=False)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(shutil, "copytree", full)
        compile_model(config)
    assert "cannot keep the bundle" in caplog.text
    open_bundle(tmp_path / "bundle")
    assert not [*(tmp_path / "cache").glob("*bundle-*")]
    assert "load" in stages(replace(config, output=tmp_path / "again"))


def test_another_disk_gets_copies(inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: object) -> NoReturn:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", elsewhere)
    config = replace(inputs, evaluate=False)
    compile_model(config)
    shutil.rmtree(tmp_path / "bundle")
    assert stages(config) == ["hash", "copy"]


def test_the_cache_keeps_the_bundles_that_were_used_last(compiled: CompileConfig, tmp_path: Path) -> None:
    (first,) = (tmp_path / "cache").glob("bundle-*")
    for number in range(4):
        shutil.copytree(first, tmp_path / "cache" / f"bundle-{number}.older")
        os.utime(tmp_path / "cache" / f"bundle-{number}.older", (number + 1, number + 1))
    os.utime(first, (0, 0))
    # Taken again, it is no longer the oldest; the next one drives out the two oldest.
    assert stages(replace(compiled, output=tmp_path / "again")) == ["hash", "copy"]
    compile_model(replace(compiled, output=tmp_path / "other", dense=False))
    left = {path.name for path in (tmp_path / "cache").glob("bundle-*")}
    assert len(left) == 4
    assert {first.name, "bundle-2.older", "bundle-3.older"} < left
