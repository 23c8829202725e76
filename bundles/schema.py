"""Frozen dataclasses from JSON, with every problem reported at once."""

import dataclasses
import sys
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["parse"]

T = TypeVar("T")


def parse(cls: type[T], data: Any, where: str, problems: list[str]) -> T | None:
    """Build a dataclass from parsed JSON.

    Args:
        cls: a dataclass with fields of str, int, float, bool, None, Literal, tuple, str-keyed dict, Any, dataclass.
        data: what `json.loads` returned.
        where: what to call this value in a problem, such as "manifest.model".
        problems: receives one line for each thing that is wrong.
    Returns:
        The instance, or None when anything in it is wrong.
    """
    if not isinstance(data, dict):
        problems.append(f"{where}: expected an object, got {type(data).__name__}")
        return None
    num_before = len(problems)
    hints = _hints(cls)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in data:
            values[field.name] = _value(hints[field.name], data[field.name], f"{where}.{field.name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{where}.{field.name}: missing")
    return cls(**values) if len(problems) == num_before else None


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    """Types of a dataclass's fields; a manifest has hundreds of some."""
    return get_type_hints(cls)


def _value(hint: Any, data: Any, where: str, problems: list[str]) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return data
    if origin is Literal:
        if data in get_args(hint):
            return data
        problems.append(f"{where}: expected {', '.join(map(str, get_args(hint)))}, got {data!r}")
        return None
    if origin in (Union, types.UnionType):
        return _optional(hint, data, where, problems)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, data, where, problems)
    if origin is tuple and isinstance(data, list):
        item = get_args(hint)[0]
        return tuple(_value(item, value, f"{where}[{index}]", problems) for index, value in enumerate(data))
    if origin in (dict, Mapping) and isinstance(data, dict):
        item = get_args(hint)[1]
        return {key: _value(item, value, f"{where}.{key}", problems) for key, value in data.items()}
    if _is_scalar(hint, data):
        return float(data) if hint is float else data
    expected = getattr(origin or hint, "__name__", str(hint))
    problems.append(f"{where}: expected {expected}, got {type(data).__name__} {str(data)[:40]!r}")
    return None


def _optional(hint: Any, data: Any, where: str, problems: list[str]) -> Any:
    """Parse `X | None`, the only union that the schema uses."""
    if data is None:
        return None
    (inner,) = (option for option in get_args(hint) if option is not type(None))
    return _value(inner, data, where, problems)


def _is_scalar(hint: Any, data: Any) -> bool:
    if hint is float:
        # The comparison also refuses NaN, infinities and integers beyond a double; the writer writes none of them.
        return type(data) in (int, float) and abs(data) <= sys.float_info.max
    return hint in (str, int, bool) and type(data) is hint
