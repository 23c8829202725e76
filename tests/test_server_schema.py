"""The server against its own description: schemathesis makes up requests, right and wrong ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
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
def server(bundle: Path) -> Iterator[RunningServer]:
    with serving(bundle, "--max-new-tokens", 8) as running:
        yield running


@pytest.fixture(scope="module")
def description(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


# schemathesis' own decorator for pytest does not get along with pytest 9: hypothesis is driven by hand.
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        ("GET", path, GenerationMode.POSITIVE)
        for path in ("/", "/health", "/metrics", "/v1/models", "/api/tags", "/api/ps", "/api/version")
    ]
    + [
        (method, path, mode)
        for method, path in (
            ("GET", "/v1/models/{model}"),
            ("GET", "/coreinfer/map"),
            ("POST", "/coreinfer/place"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/api/chat"),
            ("POST", "/api/generate"),
            ("POST", "/api/show"),
        )
        for mode in GenerationMode
        # Any text can be a name in a path.
        if (path, mode) != ("/v1/models/{model}", GenerationMode.NEGATIVE)
    ],
)
def test_every_answer_is_as_described(
    description: Any, bundle: Path, method: str, path: str, mode: GenerationMode
) -> None:
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            # Names out of thin air would all end at status 404.
            for part in (case.body, case.query):
                if isinstance(part, dict) and "model" in part:
                    part["model"] = bundle.name
        case.call_and_validate(checks=CHECKS, timeout=20)

    check()


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
        "/api/chat",
        "/api/generate",
        "/api/ps",
        "/api/show",
        "/api/tags",
        "/api/version",
    }


def test_the_description_needs_no_other_server(server: RunningServer) -> None:
    assert "http://" not in server.get("/openapi.json").text.replace(server.url, "")
