"""The bytes of the program that compiles: its version says too little while it is being worked on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import coreinfer.bundles
from coreinfer.bundles.checksums import file_sha256

__all__ = ["program_sha256"]


def program_sha256() -> str:
    """Hash the packages that make bundles."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(coreinfer.bundles.__path__[0])):
        for path in _files(folder):
            if "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
