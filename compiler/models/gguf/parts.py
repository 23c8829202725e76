"""A model in several GGUF files, as llama.cpp splits it: `NAME-00001-of-00003.gguf` and so on."""

import re
from collections.abc import Sequence
from pathlib import Path

from coreinfer.bundles.errors import ConfigError

from .header import Header, TensorEntry, read_header

__all__ = ["part_paths", "read_parts"]

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBER, _COUNT, _NUM_TENSORS = "split.no", "split.count", "split.tensors.count"
_SPLIT_KEYS = frozenset({_NUMBER, _COUNT, _NUM_TENSORS})


def part_paths(path: Path) -> list[Path]:
    """Paths of all parts that a file's name speaks of, in order; the file alone where it speaks of none."""
    match = _PART.fullmatch(path.name)
    if match is None or not 0 < int(match["number"]) <= int(match["count"]):
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def read_parts(path: Path) -> Header:
    """Read the header of a model, in one file or several, whichever part is given.

    Returns:
        The first part's metadata, and the tensors of all parts.
    Raises:
        ConfigError: a part is missing or damaged, or the parts are not of one model.
    """
    paths = part_paths(path)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise ConfigError(f"{path.name}: a model in {len(paths)} files, of which {', '.join(missing)} is missing")
    headers = [read_header(part) for part in paths]
    for index, header in enumerate(headers):
        _check_place(header, index, len(headers))
    if len(headers) > 1:
        _check_same_model(headers)
    return Header(file=paths[0], metadata=headers[0].metadata, tensors=_all_tensors(headers))


def _check_place(header: Header, index: int, count: int) -> None:
    stated = int(header.metadata.get(_COUNT, 1) or 1)
    if stated != count:
        raise ConfigError(
            f"{header.file.name}: it says that it is one of {stated} files ({_COUNT}), its name says one of {count}; "
            "name the parts as llama.cpp does, NAME-00001-of-00003.gguf and so on"
        )
    number = int(header.metadata.get(_NUMBER, index))
    if number != index:
        raise ConfigError(
            f"{header.file.name}: by its name part {index + 1}, by what is in it part {number + 1} ({_NUMBER}); "
            "name the parts as they were written"
        )


def _check_same_model(headers: Sequence[Header]) -> None:
    first = headers[0]
    for header in headers[1:]:
        # Parts after the first hold little metadata; what they do hold is that of the first.
        shared = (header.metadata.keys() & first.metadata.keys()) - _SPLIT_KEYS
        other = sorted(key for key in shared if header.metadata[key] != first.metadata[key])
        other += [key for key in (_NUM_TENSORS,) if header.metadata.get(key) != first.metadata.get(key)]
        if other:
            raise ConfigError(
                f"{header.file.name}: a part of another model than {first.file.name}; they differ in {', '.join(other)}"
            )


def _all_tensors(headers: Sequence[Header]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        twice = sorted(tensors.keys() & header.tensors.keys())
        if twice:
            raise ConfigError(
                f"{header.file.name}: it repeats {', '.join(twice[:3])} of {tensors[twice[0]].file.name}; "
                "the parts are not of one model"
            )
        tensors |= header.tensors
    stated = headers[0].metadata.get(_NUM_TENSORS)
    if stated is not None and len(headers) > 1 and int(stated) != len(tensors):
        raise ConfigError(
            f"{headers[0].file.name}: expected {stated} tensors in all parts ({_NUM_TENSORS}), got {len(tensors)}; "
            "the parts are not of one model, or one of them was changed"
        )
    return tensors
