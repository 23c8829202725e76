"""Write a bundle so that it is either complete or does not exist."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .checksums import file_sha256
from .errors import BundleError
from .layout import LAYOUT
from .manifest import FileRecord, Manifest, write_manifest
from .pages import forget_pages

__all__ = [
    "check_target",
    "disk_errors",
    "existing_parent",
    "file_sha256",
    "finish_manifest",
    "scratch_folder",
    "stage_bundle",
]

_log = logging.getLogger(__name__)


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that cannot become a bundle, before hours are spent on one.

    Raises:
        BundleError: it exists and `force` is off, it is not a bundle that `force` may replace, or its parent is a file.
    """
    if target.exists() or target.is_symlink():
        if not force:
            raise BundleError(f"{target} exists; give another -o or add --force to replace it")
        if not _replaceable(target):
            raise BundleError(f"{target} exists and is not a bundle; --force replaces only bundles: give another -o")
    for parent in target.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise BundleError(f"{target}: {parent} is a file; give another -o")
            break


def _replaceable(target: Path) -> bool:
    """Whether `--force` may replace it: a bundle or an empty folder, so that a mistyped -o costs nothing."""
    return target.is_dir() and ((target / LAYOUT.manifest).exists() or not any(target.iterdir()))


@contextmanager
def stage_bundle(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder next to `target` that becomes `target` when the block ends without an exception.

    Everything is fsynced before the rename; with `force` an existing bundle is moved aside first and removed after.

    Raises:
        BundleError: the target exists, or the disk cannot take the bundle; the target is then as it was.
    """
    check_target(target, force=force)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            stage.chmod(0o755)
            yield stage
            _fsync_tree(stage)
            _swap_in(stage, target, force=force)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a failed write in the block into an error that names the bundle.

    Raises:
        BundleError: the disk cannot take the bundle.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_write(target, error) from error


def existing_parent(target: Path) -> Path:
    """Find the nearest existing folder above a path, which is on the disk that the path will be written to."""
    return next(parent for parent in target.absolute().parents if parent.exists())


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Make a folder on the bundle's disk for the block, from where files can be moved into the bundle.

    Raises:
        BundleError: the disk cannot take it.
    """
    with disk_errors(target):
        folder = tempfile.TemporaryDirectory(dir=existing_parent(target), prefix=f".{target.name}.scratch-")
    with folder as name:
        yield Path(name)


def finish_manifest(stage: Path, manifest: Manifest) -> Manifest:
    """Record checksum and size of every file under `stage`, write the manifest there and return it whole."""
    names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
    files = {
        name: FileRecord(sha256=file_sha256(stage / name), bytes=(stage / name).stat().st_size)
        for name in names
        if name != LAYOUT.manifest
    }
    whole = replace(manifest, files=files)
    write_manifest(stage / LAYOUT.manifest, whole)
    return whole


def _cannot_write(target: Path, error: OSError) -> BundleError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        usage = shutil.disk_usage(existing_parent(target))
        reason += f" ({usage.free >> 20} MiB free); free some space or give another -o"
    return BundleError(f"cannot write the bundle {target}: {reason}; nothing was left behind")


def _fsync_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        forget_pages(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(stage: Path, target: Path, *, force: bool) -> None:
    """Rename the finished folder to its name."""
    check_target(target, force=force)  # Hours may have passed since the first check.
    if target.exists():
        _replace(target, stage)
    else:
        stage.rename(target)
    try:
        _fsync(target.parent)
    except OSError as error:
        _log.warning("wrote %s, but could not flush its name to disk: %s", target, error)
    _log.info("wrote %s", target)


def _replace(target: Path, stage: Path) -> None:
    """Put `stage` in the place of an old bundle, which goes back there on any failure, Ctrl-C too."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = aside / "bundle"
    try:
        target.rename(old)
        stage.rename(target)
    except BaseException:
        if not target.exists():
            _put_back(old, target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    try:
        old.rename(target)
    except OSError as error:
        raise BundleError(f"cannot replace {target} ({error.strerror}); the old bundle is now {old}") from error
