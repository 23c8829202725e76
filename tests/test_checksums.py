"""Hashes of files: read or mapped, they are those of the bytes."""

import hashlib
from pathlib import Path

import pytest
from coreinfer.bundles import checksums
from coreinfer.bundles.checksums import file_sha256, mapped_sha256


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 20_000])
def test_a_hash_is_that_of_the_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert file_sha256(path) == mapped_sha256(path) == hashlib.sha256(content).hexdigest()


def test_pages_that_cannot_be_had_at_once_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older systems cannot bring them in, and of a damaged disk a read says so where a mapping would crash."""

    def refuse(mapped: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(checksums, "populate", refuse)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert mapped_sha256(path) == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_raises_the_readers_error(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / kind).mkdir()
    for hash_of in (file_sha256, mapped_sha256):
        with pytest.raises(OSError, match=kind):
            hash_of(tmp_path / kind)
