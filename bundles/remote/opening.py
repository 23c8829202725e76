"""Find a bundle: give its folder, or fetch what is needed of one that is elsewhere."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from coreinfer.bundles.checksums import file_sha256
from coreinfer.bundles.errors import BundleCorrupt
from coreinfer.bundles.manifest import FileRecord, Manifest, read_manifest
from coreinfer.bundles.reader import later_files

from .places import HubPlace, parse_place

__all__ = ["FoundBundle", "Mirror", "find_bundle"]

Fetch = Callable[[str], None]
"""Puts a file, by its name in the layout, into the bundle's folder; returns at once where it is there."""
_PARALLEL = 4


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """A folder that holds what was fetched of a bundle elsewhere; its manifest is there.

    Attributes:
        place: the address, for errors.
        download: (name, record, anew) puts a file into the folder; with `anew` one that is there is fetched again.
    """

    place: str
    folder: Path
    download: Callable[[str, FileRecord, bool], None]


@dataclass(frozen=True, kw_only=True)
class FoundBundle:
    """A bundle's folder.

    Attributes:
        fetch: None where all files are in it.
    """

    folder: Path
    fetch: Fetch | None = None


@dataclass(frozen=True, kw_only=True)
class _Fetcher:
    mirror: Mirror
    manifest: Manifest
    locks: dict[str, threading.Lock] = field(default_factory=dict)

    def __call__(self, name: str) -> None:
        """Fetch a file, once even if several threads ask, and compare it with the manifest.

        Raises:
            BundleError: it cannot be had, or is not what the manifest lists.
        """
        with self.locks.setdefault(name, threading.Lock()):
            path, record = self.mirror.folder / name, self.manifest.files[name]
            if path.exists():
                return
            for anew in (False, True):
                self.mirror.download(name, record, anew)
                if file_sha256(path) == record.sha256:
                    return
            path.unlink()
            raise BundleCorrupt(
                f"{self.mirror.place}: {name}: expected sha256 {record.sha256[:12]}..., what arrived twice is another "
                "file; whoever keeps the bundle must upload it again"
            )


def find_bundle(location: str | Path) -> FoundBundle:
    """Return the folder of a bundle; of one that is elsewhere, all that every prompt needs is fetched first.

    Args:
        location: a folder, hf:USER/NAME[@REVISION], https://... or s3://...
    Raises:
        BundleError: there is no bundle, it cannot be fetched, or what arrives does not fit its manifest.
        ConfigError: the address is malformed, or packages to read it are not installed.
    """
    place = parse_place(location)
    if place is None:
        return FoundBundle(folder=Path(location))
    if isinstance(place, HubPlace):
        # Not at the top: a folder needs neither.
        from .hub import mirror_hub

        mirror = mirror_hub(place)
    else:
        from .web import mirror_web

        mirror = mirror_web(place)
    manifest = read_manifest(mirror.folder)
    fetch = _Fetcher(mirror=mirror, manifest=manifest)
    _fetch_all(fetch, [name for name in manifest.files if name not in later_files(manifest)])
    return FoundBundle(folder=mirror.folder, fetch=fetch)


def _fetch_all(fetch: Fetch, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(max_workers=_PARALLEL, thread_name_prefix="coreinfer-fetch") as pool:
        for done in [pool.submit(fetch, name) for name in names]:
            done.result()
