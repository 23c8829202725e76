import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import transformers
from coreinfer.bundles import open_bundle
from coreinfer.bundles.errors import (
    BundleError,
    CalibrationError,
    ConfigError,
    CoreInferError,
    UnsupportedModelError,
)
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.progress import Advance
from coreinfer.compiler.quantize import pack as packing

from .model_factory import corpus_texts

CACHED = ["embed", "distil", "profile", "reconstruct"]
"""Stages whose results are kept, in the order in which they run."""


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, dot files too: contents of files, None for folders."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


@dataclass(kw_only=True)
class Interrupting(Progress):
    """Ctrl-C after so many steps of a stage."""

    at_stage: str
    after_steps: int = 1

    @contextmanager
    def bar(self, name: str, num_steps: int) -> Iterator[Advance]:
        done = 0

        def advance(steps: int = 1) -> None:
            nonlocal done
            done += steps
            if name == self.at_stage and done >= self.after_steps:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_same_options_give_the_same_bytes(
    family: str, tiny_inputs: Callable[[str], CompileConfig], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    compile_model(replace(tiny_inputs(family), output=tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tiny_bundle(family))


def test_places_of_inputs_are_not_in_the_bundle(
    tiny_inputs: Callable[[str], CompileConfig], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_inputs("llama")
    moved = {"model": config.model, "encoder": str(config.encoder), "calibration": config.calibration[0]}
    for name, old in moved.items():
        new = tmp_path / name / Path(old).name
        new.parent.mkdir()
        moved[name] = str(shutil.copytree(old, new) if Path(old).is_dir() else shutil.copy(old, new))
    compile_model(
        replace(
            config,
            model=moved["model"],
            encoder=moved["encoder"],
            calibration=(moved["calibration"],),
            output=tmp_path / "bundle",
            cache_dir=tmp_path / "cache",
        )
    )
    assert contents(tmp_path / "bundle") == contents(tiny_bundle("llama"))
    assert str(tmp_path).encode() not in (tmp_path / "bundle" / "manifest.json").read_bytes()


@pytest.mark.parametrize("option", [{"seed": 1}, {"keep": 0.4}, {"clusters": 3}, {"calibration_tokens": 2000}])
def test_options_change_the_bundle(option: dict[str, Any], tiny_bundle: Callable[..., Path]) -> None:
    name = "clusters/000.safetensors"
    assert (tiny_bundle("llama", **option) / name).read_bytes() != (tiny_bundle("llama") / name).read_bytes()


@pytest.mark.parametrize(
    ("stage", "num_finished"), [("embed", 0), ("profile", 2), ("reconstruct", 3), ("evaluate", 4), ("write", 4)]
)
def test_an_interrupted_compile_goes_on(
    stage: str,
    num_finished: int,
    tiny_inputs: Callable[[str], CompileConfig],
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    config = replace(tiny_inputs("llama"), output=place / "bundle", cache_dir=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        compile_model(config, Interrupting(at_stage=stage))
    assert contents(place) == {}
    progress = Progress()
    compile_model(config, progress)
    assert [name for name in CACHED if name in progress.stage_seconds] == CACHED[num_finished:]
    assert contents(place / "bundle") == contents(tiny_bundle("llama"))


def test_repaired_layers_are_not_repaired_again(
    tiny_inputs: Callable[[str], CompileConfig], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    config = replace(tiny_inputs("llama"), output=tmp_path / "bundle", cache_dir=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        compile_model(config, Interrupting(at_stage="reconstruct", after_steps=2))
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("narrow-*")}
    assert len(finished) == 2
    compile_model(config)
    assert len([*(tmp_path / "cache").glob("narrow-*")]) == 3
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(tmp_path / "bundle") == contents(tiny_bundle("llama"))


def test_efforts_do_not_take_each_others_layers(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    """What `best` repairs has more cluster weights to choose from."""
    for effort, expected in (("normal", 3), ("best", 6), ("normal", 6)):
        given: dict[str, Any] = {"effort": effort, "heal_steps": 0, "controls": False, "evaluate": False}
        config = replace(tiny_inputs("llama"), output=tmp_path / "bundle", cache_dir=tmp_path / "cache", **given)
        compile_model(replace(config, force=True))
        assert len([*(tmp_path / "cache").glob("narrow-*")]) == expected


@pytest.fixture(scope="module")
def cached_stages(tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as a compile leaves it, without the whole bundle; only copies may be changed."""
    folder = tmp_path_factory.mktemp("cached")
    compile_model(replace(tiny_inputs("llama"), output=folder / "bundle", cache_dir=folder / "cache"))
    for whole_bundle in (folder / "cache").glob("bundle-*"):
        shutil.rmtree(whole_bundle)
    return folder / "cache"


@pytest.mark.parametrize("stage", ["embed", "distil", "distil-tokenizer", "profile", "narrow-layer"])
def test_damaged_cache_files_are_computed_again(
    stage: str,
    tiny_inputs: Callable[[str], CompileConfig],
    tiny_bundle: Callable[..., Path],
    cached_stages: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = shutil.copytree(cached_stages, tmp_path / "cache")
    damaged = [path for path in cache.iterdir() if path.name.rpartition("-")[0] == stage]
    whole = {path: path.read_bytes() for path in damaged}
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-7])
    compile_model(replace(tiny_inputs("llama"), output=tmp_path / "bundle", cache_dir=cache))
    assert {path: path.read_bytes() for path in damaged} == whole
    assert all(str(path) in caplog.text for path in damaged)
    assert contents(tmp_path / "bundle") == contents(tiny_bundle("llama"))


def test_a_cache_that_takes_nothing_is_an_error_of_one_line(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    config = replace(tiny_inputs("llama"), output=tmp_path / "bundle", cache_dir=tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--cache .*file.*--no-cache") as caught:
        compile_model(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stage", "num_steps"), [("profile", 3), ("pack", 3), ("evaluate", 3), ("write", 2)])
def test_force_keeps_the_old_bundle_until_the_new_one_is_whole(
    stage: str,
    num_steps: int,
    tiny_inputs: Callable[[str], CompileConfig],
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    old = tiny_bundle("llama", seed=1)
    shutil.copytree(old, tmp_path / "bundle")
    config = replace(tiny_inputs("llama"), output=tmp_path / "bundle", force=True)
    with pytest.raises(KeyboardInterrupt):
        compile_model(config, Interrupting(at_stage=stage, after_steps=num_steps))
    assert contents(tmp_path / "bundle") == contents(old)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    compile_model(config)
    assert contents(tmp_path / "bundle") == contents(tiny_bundle("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_interrupted_compile_leaves_no_folders_above_its_bundle(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    config = replace(tiny_inputs("llama"), output=tmp_path / "new" / "bundle")
    with pytest.raises(KeyboardInterrupt):
        compile_model(config, Interrupting(at_stage="evaluate"))
    assert contents(tmp_path) == {}
    compile_model(config)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def _damage_weights(folder: Path) -> dict[str, Any]:
    weights = folder / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return {}


def _no_tokenizer(folder: Path) -> dict[str, Any]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "llama" / name).unlink()
    return {}


def _no_weights(folder: Path) -> dict[str, Any]:
    (folder / "llama" / "model.safetensors").unlink()
    return {}


def _bloom(folder: Path) -> dict[str, Any]:
    transformers.BloomConfig(n_layer=1, n_head=1, hidden_size=8).save_pretrained(folder / "bloom")
    return {"model": str(folder / "bloom")}


def _unknown_type(folder: Path) -> dict[str, Any]:
    (folder / "strange").mkdir()
    (folder / "strange" / "config.json").write_text(json.dumps({"model_type": "strange_lm"}))
    return {"model": str(folder / "strange")}


def _parent_is_a_file(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return {"output": folder / "file" / "bundle"}


def _target_exists(folder: Path) -> dict[str, Any]:
    (folder / "bundle").mkdir()
    (folder / "bundle" / "precious").write_text("mine")
    return {}


def _target_is_no_bundle(folder: Path) -> dict[str, Any]:
    return {**_target_exists(folder), "force": True}


def _corpus(text: str, **options: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "short.txt").write_text(text)
        return {"calibration": (str(folder / "short.txt"),), **options}

    return write


def _option(**options: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: options


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (_option(keep=0.0), ConfigError, r"--keep: expected a number in \(0, 1\], got 0"),
        (_option(min_layer_keep=0.9, budgets="energy"), ConfigError, "--min-layer-keep 0.9: expected at most --keep"),
        (_option(device="nonsense"), ConfigError, "--device nonsense"),
        (_option(document_tokens=257), ConfigError, "--document-tokens 257: the model reads 256"),
        (_option(model="./missing"), ConfigError, "--model ./missing: no such file"),
        (_option(model="/"), ConfigError, "no model can be read there"),
        (_option(encoder="/missing"), ConfigError, "--encoder /missing: no such file"),
        (_damage_weights, ConfigError, "--model llama: its weights cannot be loaded"),
        (_no_weights, ConfigError, "--model llama: its weights cannot be loaded"),
        (_no_tokenizer, ConfigError, "--model llama: its tokenizer"),
        (_bloom, UnsupportedModelError, "bloom.*supported families: opt"),
        (_unknown_type, UnsupportedModelError, "strange_lm.*supported families: opt"),
        (_option(clusters=200), CalibrationError, r"--clusters 200: more than the 96 texts .*\(120 in all\)"),
        (_option(calibration=("/missing.txt",)), CalibrationError, "--calibration /missing.txt: no such file"),
        (_option(calibration_tokens=100), CalibrationError, "--calibration-tokens 100, expected at least 5"),
        (_corpus(""), CalibrationError, r"short.txt: holds no text"),
        (_corpus(" \n\n\t\n\n"), CalibrationError, r"short.txt: holds no text"),
        (_corpus("\n\n".join(corpus_texts()[:4]), clusters=1), CalibrationError, "4 different usable texts"),
        (_corpus("\n\n".join([corpus_texts()[0]] * 40), clusters=2), CalibrationError, "1 different usable texts"),
        (_parent_is_a_file, BundleError, "file is a file; give another -o"),
        (_target_exists, BundleError, "bundle exists; give another -o or add --force"),
        (_target_is_no_bundle, BundleError, "bundle exists and is not a bundle"),
    ],
)
def test_wrong_inputs_are_one_line_and_leave_nothing(
    prepare: Callable[[Path], dict[str, Any]],
    error: type[CoreInferError],
    message: str,
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path: Path,
) -> None:
    config = tiny_inputs("llama")
    shutil.copytree(config.model, tmp_path / "llama")
    options = {"model": str(tmp_path / "llama"), "output": tmp_path / "bundle", **prepare(tmp_path)}
    before = contents(tmp_path)
    with pytest.raises(error, match=message) as caught:
        compile_model(replace(config, **options))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [{"clusters": 4}, {"clusters": 1}, {"clusters": "auto"}])
def test_five_texts_are_enough(
    options: dict[str, Any], tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    (tmp_path / "five.txt").write_text("\n\n".join(corpus_texts()[:5]))
    config = replace(
        tiny_inputs("llama"), output=tmp_path / "bundle", calibration=(str(tmp_path / "five.txt"),), **options
    )
    manifest = compile_model(config)
    assert sum(cluster.num_sentences for cluster in manifest.clusters) == 4
    assert len(open_bundle(tmp_path / "bundle").packs) == len(manifest.clusters)


def _full(*args: object, **kwargs: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "function"),
    [(packing, "write_tensors"), (packing, "stream_tensors"), (os, "fsync"), (Path, "write_text")],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    module: Any,
    function: str,
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(tiny_inputs("llama"), output=tmp_path / "bundle", evaluate=False)
    monkeypatch.setattr(module, function, _full)
    with pytest.raises(BundleError, match=r"cannot write the bundle .*No space left.*MiB free") as caught:
        compile_model(config)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}
