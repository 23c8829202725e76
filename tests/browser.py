"""Debian's headless Chromium for tests of pages; as a command it takes the screenshots of docs/images.

    python -m tests.browser FILE_OR_URL PICTURE [--screen phone-dark]

Tests take the fixture `browser` (conftest.py) and open pages with `visit`, which fails on what the page complains of
and on each request that leaves it. Where playwright or Chromium is not installed, they are skipped.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import click
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route

__all__ = ["SCREENS", "Screen", "open_browser", "overflow_pixels", "visit"]

TIMEOUT_MILLISECONDS = 20_000
_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_LOOPBACK = {"127.0.0.1", "localhost", "[::1]", "::1"}


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What a page is shown on; sizes in CSS pixels."""

    name: str
    width: int
    height: int
    colors: Literal["light", "dark"]

    @property
    def is_phone(self) -> bool:
        """Whether it is touched, and its viewport follows the page's own meta tag."""
        return self.width < 600


SCREENS = tuple(
    Screen(name=f"{name}-{colors}", width=width, height=height, colors=colors)
    for name, width, height in (("desktop", 1280, 900), ("phone", 390, 844))
    for colors in ("light", "dark")
)
"""Desktop and phone, light and dark: desktop-light, desktop-dark, phone-light, phone-dark."""


def find_chromium() -> str | None:
    """Find the system's Chromium; playwright's own download is not used."""
    return next((path for name in _CHROMIUM_NAMES if (path := shutil.which(name))), None)


def open_browser() -> Iterator["Browser"]:
    """Start Chromium with a profile of its own, and end it; skip where there is none.

    playwright's event loop runs in this thread until then: hold it for a module, not for the session, or other tests
    could not run a loop of their own.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (.[dev])")
    executable = find_chromium()
    if executable is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        # launch() makes a new profile folder, and removes it.
        browser = playwright.chromium.launch(executable_path=executable, args=list(_FLAGS), headless=True)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: "Browser", url: str, screen: Screen = SCREENS[0], *, script: bool = True) -> Iterator["Page"]:
    """Open a page of this machine: a file: or loopback URL.

    Args:
        script: whether the page's scripts run.
    Raises:
        AssertionError: at the end, naming every warning or error of the console, uncaught exception, failed request
            and request that went elsewhere; such requests are refused before they leave.
    """
    problems: list[str] = []

    def refuse_outside(route: "Route", request: "Request") -> None:
        if is_inside(request.url):
            route.continue_()
        else:
            problems.append(f"request to {request.url}")
            route.abort()

    def note_console(message: "ConsoleMessage") -> None:
        if message.type in ("error", "warning"):
            problems.append(f"console {message.type}: {message.text}")

    context = browser.new_context(
        viewport={"width": screen.width, "height": screen.height},
        color_scheme=screen.colors,
        is_mobile=screen.is_phone,
        has_touch=screen.is_phone,
        java_script_enabled=script,
        service_workers="block",
    )
    context.set_default_timeout(TIMEOUT_MILLISECONDS)
    context.route("**/*", refuse_outside)
    try:
        page = context.new_page()
        page.on("console", note_console)
        page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url} ({request.failure})"))
        page.goto(url, wait_until="load")
        yield page
        assert not problems, "; ".join(problems)
    finally:
        context.close()


def is_inside(url: str) -> bool:
    """Whether a request stays within this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob", "about") or (parts.hostname or "") in _LOOPBACK


def overflow_pixels(page: "Page") -> int:
    """By how much a page is wider than its window, that is, scrolls sideways."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@click.command()
@click.argument("source")
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--screen", "name", type=click.Choice([screen.name for screen in SCREENS]), default=SCREENS[0].name)
@click.option("--height", type=int, default=None, help="Pixels to take from the top.  [default: one screen]")
def main(source: str, picture: Path, name: str, height: int | None) -> None:
    """Take a picture of SOURCE, a file or a loopback URL."""
    screen = next(screen for screen in SCREENS if screen.name == name)
    url = source if "://" in source else Path(os.path.abspath(source)).as_uri()
    clip = {"x": 0.0, "y": 0.0, "width": float(screen.width), "height": float(height or screen.height)}
    with contextmanager(open_browser)() as browser, visit(browser, url, screen) as page:
        page.screenshot(path=picture, full_page=True, clip=clip)


if __name__ == "__main__":
    main()
