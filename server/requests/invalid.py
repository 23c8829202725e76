"""What is wrong with a request's body, in the client's own terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Invalid", "describe_invalid"]

Details = Sequence[Mapping[str, Any]]

_REASONS = {
    "extra_forbidden": "not supported by this server; leave it out",
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "list_type": "Input should be a list",
    "string_type": "Input should be a string",
    "string_pattern_mismatch": "Input has characters or a length that are not allowed here",
}
_MAX_PROBLEMS = 8
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}


@dataclass(frozen=True, kw_only=True)
class Invalid:
    """What to tell the client.

    Attributes:
        message: names all fields that are wrong.
        param: the first of them, a dotted path; None for the body itself.
        code: of the first, as at OpenAI.
    """

    message: str
    param: str | None
    code: str | None


def describe_invalid(details: Details, body: Any) -> Invalid:
    """Name all fields that are wrong, each once.

    Args:
        details: as pydantic reports them: of a field that may be one of several things, one for each of these.
        body: of the request.
    """
    if any(detail["type"] == "json_invalid" for detail in details):
        reason = details[0].get("ctx", {}).get("error", "")
        return Invalid(message=f"the body is not JSON: {reason}", param=None, code=None)
    problems: dict[str, list[Mapping[str, Any]]] = {}
    for detail in details:
        problems.setdefault(_path(detail, body), []).append(detail)
    shown = {path: _telling(found) for path, found in problems.items() if not _is_explained(path, found, problems)}
    named = [
        f"{path}: {reason}" if path else reason
        for path, found in shown.items()
        for reason in [" or ".join(dict.fromkeys(_reason(detail) for detail in found))]
    ]
    more = [f"and {len(named) - _MAX_PROBLEMS} more"] if len(named) > _MAX_PROBLEMS else []
    message = "; ".join(named[:_MAX_PROBLEMS] + more)
    first = next(iter(shown))
    return Invalid(message=message, param=first or None, code=_code(shown[first][0]))


def _path(detail: Mapping[str, Any], body: Any) -> str:
    """Leave out of a place what is not in the body, but names of the server's own types."""
    parts = detail["loc"][1:]
    if detail["loc"][0] != "body":
        return ".".join(map(str, parts))
    kept: list[str] = []
    value = body
    for part in parts:
        if _holds(value, part):
            value = value[part]
        elif detail["type"] != "missing" or part is not parts[-1]:
            continue
        kept.append(str(part))
    return ".".join(kept)


def _holds(value: Any, part: Any) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _is_mismatch(detail: Mapping[str, Any]) -> bool:
    """Whether a value is another kind of thing than one of those it may be."""
    return str(detail["type"]).endswith("_type") or detail["type"] == "literal_error"


def _is_explained(path: str, found: Details, problems: Mapping[str, Details]) -> bool:
    """Whether a value of the right kind has something wrong inside, which is told there."""
    inside = any(other.startswith(f"{path}.") for other in problems if path)
    return inside and all(_is_mismatch(detail) for detail in found)


def _telling(found: Details) -> Details:
    """Keep what is wrong with a value as the kind of thing that it is; if it is none, what it may be."""
    return [detail for detail in found if not _is_mismatch(detail)] or found


def _code(detail: Mapping[str, Any]) -> str:
    return _CODES.get(detail["type"], "invalid_type" if _is_mismatch(detail) else "invalid_value")


def _reason(detail: Mapping[str, Any]) -> str:
    return _REASONS.get(detail["type"]) or str(detail["msg"]).removeprefix("Value error, ")
