"""Mapped files: what is read, what is forgotten, what is only a hint."""

import mmap
from contextlib import suppress
from pathlib import Path

import pytest
from coreinfer.bundles.pages import forget_pages, map_file, populate, touch

CONTENT = bytes(range(256)) * 20_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


def test_a_mapping_is_the_file_and_writes_stay_private(path: Path) -> None:
    with map_file(path) as mapped:
        assert mapped[:] == CONTENT
        mapped[0] = 7
    assert path.read_bytes() == CONTENT


def test_bringing_pages_into_memory_leaves_the_bytes_alone(path: Path) -> None:
    with map_file(path) as mapped:
        # Linux before 5.14 and other systems cannot do it, and say so.
        with suppress(OSError):
            populate(mapped)
        touch(mapped)
        assert mapped[:] == CONTENT


def test_pages_that_are_forgotten_are_read_again(path: Path) -> None:
    with path.open("rb") as file:
        forget_pages(file.fileno())
    assert path.read_bytes() == CONTENT


def test_what_cannot_be_mapped_raises(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, error in (("missing", OSError), ("empty", ValueError)):
        with pytest.raises(error):
            map_file(tmp_path / name)


def test_huge_pages_are_a_hint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without them refuses the advice, or has no name for it."""
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    with map_file(path) as mapped:
        assert mapped[:] == CONTENT
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    with map_file(path) as mapped:
        assert mapped[:] == CONTENT
