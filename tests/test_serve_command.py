"""`coreinfer-serve` before it serves: options, addresses, what is wrong with bundles."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn
from coreinfer.server.serving import _Server

from .bundle_factory import flip_bit
from .server_process import COMMAND, serving


def refused(*arguments: object, **environment: str) -> str:
    """Run the command, which must end with one line and exit code 2."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip()


def test_a_folder_without_a_bundle(tmp_path: Path) -> None:
    assert "not a bundle" in refused(tmp_path, "--port", 0)


def test_a_damaged_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    flip_bit(copy / "base.safetensors")
    assert "base.safetensors" in refused(copy, "--port", 0)


def test_two_bundles_of_one_name(bundle: Path, tmp_path: Path) -> None:
    same = tmp_path / bundle.name
    assert refused(bundle, same) == (
        f"DIR: a bundle is served under its folder's name, and two are called {bundle.name}"
    )


def test_all_wrong_limits_at_once(bundle: Path) -> None:
    assert refused(bundle, "--queue", 0, "--timeout", "nan", "--grace", -1, COREINFER_API_KEY="") == (
        "4 problems: (1) --queue: expected a whole number of at least 1, got 0; (2) --timeout: expected a number of "
        "at least 0.001, got nan; (3) --grace: expected a number of at least 0, got -1.0; (4) COREINFER_API_KEY: "
        "expected a key, got an empty text; unset it to serve without one"
    )


def test_an_address_that_is_taken(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(bundle, "--port", port).startswith(f"--host 127.0.0.1 --port {port}: cannot be bound (")


def test_a_warning_where_everybody_may_ask(bundle: Path) -> None:
    warning = "warning: 0.0.0.0 can be reached from elsewhere, and no key is asked for; set COREINFER_API_KEY"
    with serving(bundle, "--host", "0.0.0.0") as server:
        assert server.lines[0] == warning
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert server.get("/health").status_code == 200
    with serving(bundle, "--host", "0.0.0.0", key="sesame") as server:
        assert not any("warning" in line for line in server.lines)


def test_names_that_are_allowed(bundle: Path) -> None:
    with serving(bundle, "--allow-host", "bundles.example") as server:
        statuses = [
            server.post("/v1/completions", json={}, headers={"Host": host}).status_code
            for host in ("bundles.example:80", "localhost", "[::1]:8000", "other.example")
        ]
        assert statuses == [400, 400, 400, 403]


def test_the_torch_engine_serves_too(bundle: Path) -> None:
    with serving(bundle, engine="torch") as server:
        answer = server.post("/v1/completions", json={"model": bundle.name, "prompt": "The sea", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] <= 3


def test_a_signal_within_the_first_ones_handler_starts_no_second_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    server = _Server(uvicorn.Config("unused:app"), grace_seconds=60, cut=lambda: None, on_start=lambda: None)
    started: list[bool] = []

    def start() -> None:
        started.append(server.should_exit)
        if len(started) < 3:
            server.handle_exit(signal.SIGTERM, None)

    monkeypatch.setattr(server._cut_later, "start", start)
    server.handle_exit(signal.SIGTERM, None)
    assert started == [False]
    assert server.should_exit
