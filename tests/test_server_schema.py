"""The server against its own description: schemathesis makes up requests, right and wrong ones."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from .server_process import RunningServer, serving

NUM_EXAMPLES = 40
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("llama")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with serving(bundle, "--max-new-tokens", 8) as running:
        yield running


@pytest.fixture(scope="module")
def description(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def is_positive(case: Any) -> bool:
    return bool(case.meta is None or case.meta.generation.mode.is_positive)


described = schemathesis.pytest.from_fixture("description")


@described.parametrize()
@settings(
    max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_every_answer_is_as_described(case: Any, bundle: Path) -> None:
    if is_positive(case):
        # Names out of thin air would all end at status 404.
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = bundle.name
        if "model" in (case.query or {}):
            case.query["model"] = bundle.name
    case.call_and_validate(checks=CHECKS, timeout=20)


def test_the_description_names_all_routes(server: RunningServer) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/",
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/chat/completions",
        "/v1/completions",
        "/coreinfer/map",
        "/coreinfer/place",
    }


def test_the_description_needs_no_other_server(server: RunningServer) -> None:
    assert "http://" not in server.get("/openapi.json").text.replace(server.url, "")
