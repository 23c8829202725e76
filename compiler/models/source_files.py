"""A file of a model, in its folder or on the Hub."""

from pathlib import Path

from transformers.utils.hub import cached_file

from .sources import ModelSource

__all__ = ["source_file"]


def source_file(source: ModelSource, name: str) -> Path | None:
    """Find a file of a model; None where it has none, or the Hub does not give it. What is not here yet is fetched."""
    if source.path is not None:
        path = source.path / name
        return path if path.is_file() else None
    found = cached_file(
        source.location,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
