import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from coreinfer.bundles import open_bundle
from coreinfer.bundles.errors import BundleError
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.writer import check_target, file_sha256, finish_manifest, stage_bundle

from .bundle_factory import make_manifest, write_bundle

Snapshot = dict[str, bytes | None]


def snapshot(folder: Path) -> Snapshot:
    """Everything under a folder, dot files too: contents of files, None for folders."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def before(bundle_dir: Path) -> Snapshot:
    """What the folder around an old bundle holds before the test."""
    return snapshot(bundle_dir.parent)


def refused(target: Path, *, force: bool) -> str:
    """The one line with which a target is refused, by `check_target` as by `stage_bundle`."""
    with pytest.raises(BundleError) as caught:
        check_target(target, force=force)
    with pytest.raises(BundleError), stage_bundle(target, force=force):
        pytest.fail("the block of a refused target must not run")
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_stage_becomes_the_target(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "new" / "bundle", force=False) as stage:
        assert stage.parent == tmp_path / "new"
        assert not (tmp_path / "new" / "bundle").exists()
        (stage / "file").write_bytes(b"content")
    assert snapshot(tmp_path) == {"new": None, "new/bundle": None, "new/bundle/file": b"content"}
    assert (tmp_path / "new" / "bundle").stat().st_mode & 0o777 == 0o755


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with stage_bundle(tmp_path / "bundle", force=False) as stage:
        (stage / "clusters").mkdir()
        (stage / "clusters" / "000").write_bytes(b"x")
    assert set(events[: events.index("rename")]) == {"clusters", "000", stage.name}
    assert events[events.index("rename") + 1 :] == [tmp_path.name]


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    target = write_bundle(tmp_path / "bundle")
    listed = json.loads((target / "manifest.json").read_text())["files"]
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert set(listed) == present - {"manifest.json"}
    for name, record in listed.items():
        assert record["bytes"] == (target / name).stat().st_size
        expected = subprocess.run(["sha256sum", target / name], capture_output=True, text=True, check=True).stdout
        assert record["sha256"] == expected.split()[0]


def test_finish_manifest_replaces_what_was_listed(bundle_dir: Path) -> None:
    (bundle_dir / "report.html").unlink()
    (bundle_dir / "added").write_bytes(b"x")
    whole = finish_manifest(bundle_dir, read_manifest(bundle_dir))
    assert "report.html" not in whole.files
    assert whole.files["added"].sha256 == file_sha256(bundle_dir / "added")
    assert read_manifest(bundle_dir) == whole


def test_an_existing_target_is_refused_and_untouched(bundle_dir: Path, before: Snapshot) -> None:
    assert "--force" in refused(bundle_dir, force=False)
    assert snapshot(bundle_dir.parent) == before


def test_force_replaces_a_bundle(bundle_dir: Path, before: Snapshot) -> None:
    write_bundle(bundle_dir, seed=1, dense=False, force=True)
    assert not (bundle_dir / "dense.safetensors").exists()
    assert (bundle_dir / "base.safetensors").read_bytes() != before["bundle/base.safetensors"]
    assert [path.name for path in bundle_dir.parent.iterdir()] == ["bundle"]
    open_bundle(bundle_dir)


def test_force_replaces_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    open_bundle(write_bundle(tmp_path / "bundle", force=True))


def test_force_does_not_need_an_old_bundle(tmp_path: Path) -> None:
    open_bundle(write_bundle(tmp_path / "bundle", force=True))


def write_thesis(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_force_refuses_what_is_no_bundle(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "precious"
    if kind == "folder":
        write_thesis(target)
    elif kind == "file":
        target.write_text("years of work")
    else:
        target.symlink_to(tmp_path / "absent")
    before = snapshot(tmp_path)
    assert "not a bundle" in refused(target, force=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("inner", ["bundle", "deeper/bundle"])
def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, inner: str, force: bool) -> None:
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'} is a file" in refused(tmp_path / "file" / inner, force=force)


def write_half(stage: Path, error: BaseException) -> NoReturn:
    (stage / "half").write_bytes(b"x")
    raise error


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(130), MemoryError()], ids=repr)
@pytest.mark.parametrize("force", [True, False])
def test_an_exception_in_the_block_leaves_all_as_it_was(
    bundle_dir: Path, before: Snapshot, error: BaseException, force: bool
) -> None:
    target = bundle_dir if force else bundle_dir.parent / "other"
    with pytest.raises(type(error)) as caught, stage_bundle(target, force=force) as stage:
        write_half(stage, error)
    assert caught.value is error
    assert snapshot(bundle_dir.parent) == before


def fail_with(code: int) -> Callable[..., NoReturn]:
    def fail(*args: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "MiB free"), (errno.EDQUOT, "MiB free"), (errno.EIO, "Input/output error")]
)
@pytest.mark.parametrize("force", [True, False])
def test_a_failed_flush_is_one_line_and_leaves_all_as_it_was(
    bundle_dir: Path, before: Snapshot, monkeypatch: pytest.MonkeyPatch, code: int, advice: str, force: bool
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(code))
    target = bundle_dir if force else bundle_dir.parent / "other"
    with pytest.raises(BundleError) as caught:
        write_bundle(target, force=force)
    message = str(caught.value)
    assert message.startswith(f"cannot write the bundle {target}: {os.strerror(code)}")
    assert advice in message
    assert "\n" not in message
    assert snapshot(bundle_dir.parent) == before


FILE_SIZE_LIMITED = """
import resource, signal, sys
from pathlib import Path
from coreinfer.bundles.errors import BundleError
from coreinfer.bundles.writer import stage_bundle
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with stage_bundle(Path(sys.argv[1]), force=True) as stage:
        (stage / "small").write_bytes(bytes(100))
        (stage / "large").write_bytes(bytes(100_000))
except BundleError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_takes_no_more_leaves_the_old_bundle(bundle_dir: Path, before: Snapshot) -> None:
    command = [sys.executable, "-c", FILE_SIZE_LIMITED, str(bundle_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == f"cannot write the bundle {bundle_dir}: File too large; nothing was left behind\n"
    assert snapshot(bundle_dir.parent) == before


def failing_rename(fails: Callable[[Path, Path], bool], error: BaseException) -> Callable[[Path, Path], Path]:
    rename = Path.rename

    def maybe(self: Path, target: Path) -> Path:
        if fails(self, target):
            raise error
        return rename(self, target)

    return maybe


RENAME_ERRORS = [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", RENAME_ERRORS, ids=["error", "interrupt"])
@pytest.mark.parametrize("step", ["old bundle aside", "new bundle in", "new bundle without an old one"])
def test_a_failed_rename_leaves_all_as_it_was(
    bundle_dir: Path, before: Snapshot, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    target = bundle_dir.parent / "other" if step == "new bundle without an old one" else bundle_dir

    def fails(source: Path, to: Path) -> bool:
        return source == bundle_dir if step == "old bundle aside" else ".tmp-" in source.name

    monkeypatch.setattr(Path, "rename", failing_rename(fails, error))
    with pytest.raises(BundleError if isinstance(error, OSError) else KeyboardInterrupt):
        write_bundle(target, seed=1, force=True)
    assert snapshot(bundle_dir.parent) == before


def test_an_old_bundle_that_cannot_go_back_is_kept_and_named(
    bundle_dir: Path, before: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(Path, "rename", failing_rename(lambda source, to: to == bundle_dir, error))
    with pytest.raises(BundleError, match="the old bundle is now") as caught:
        write_bundle(bundle_dir, seed=1, force=True)
    kept = Path(str(caught.value).rsplit(" ", 1)[-1])
    old = {name.removeprefix("bundle/"): data for name, data in before.items() if name != "bundle"}
    assert snapshot(kept) == old
    assert list(bundle_dir.parent.iterdir()) == [kept.parent]


@pytest.mark.parametrize("force", [True, False])
def test_what_appears_at_the_target_meanwhile_is_not_replaced(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(BundleError, match="exists"), stage_bundle(target, force=force):
        write_thesis(target)
    assert snapshot(tmp_path) == {"bundle": None, "bundle/thesis.txt": b"years of work"}


def test_a_folder_name_that_cannot_be_flushed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")) == tmp_path:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    target = write_bundle(tmp_path / "bundle")
    open_bundle(target)
    assert "could not flush" in caplog.text


def test_a_manifest_in_the_stage_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("of an earlier attempt")
    (tmp_path / "file").write_bytes(b"x")
    assert list(finish_manifest(tmp_path, make_manifest()).files) == ["file"]
