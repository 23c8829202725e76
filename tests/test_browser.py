"""The helper of the browser tests finds what it should find."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .browser import SCREENS, Screen, is_inside, overflow_pixels, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PHONE = next(screen for screen in SCREENS if screen.name == "phone-light")


@pytest.mark.parametrize(
    ("url", "inside"),
    [
        ("file:///tmp/page.html", True),
        ("data:,x", True),
        ("http://127.0.0.1:8000/health", True),
        ("http://localhost/", True),
        ("http://[::1]:8000/", True),
        ("https://example.org/", False),
        ("http://127.0.0.1.example.org/", False),
        ("http://10.0.0.1/", False),
    ],
)
def test_only_this_machine_is_inside(url: str, inside: bool) -> None:
    assert is_inside(url) == inside


def page_of(folder: Path, body: str) -> str:
    path = folder / "page.html"
    path.write_text(f'<!doctype html><meta name="viewport" content="width=device-width">{body}', encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("<script>console.error('bad news')</script>", "console error: bad news"),
        ("<script>missing()</script>", "exception: missing is not defined"),
        ("<img src='http://example.invalid/x.png'>", "request to http://example.invalid/x.png"),
        ("<link rel=stylesheet href='missing.css'>", "failed: file:"),
    ],
)
def test_what_a_page_complains_of_fails_the_test(body: str, named: str, browser: "Browser", tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=named), visit(browser, page_of(tmp_path, body)):
        pass


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.name)
def test_a_screen_has_its_size_and_colors(screen: Screen, browser: "Browser", tmp_path: Path) -> None:
    with visit(browser, page_of(tmp_path, "<p>fine</p>"), screen) as page:
        assert page.evaluate("innerWidth") == screen.width
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (screen.colors == "dark")
        assert overflow_pixels(page) == 0


def test_a_page_that_is_too_wide_is_noticed(browser: "Browser", tmp_path: Path) -> None:
    with visit(browser, page_of(tmp_path, "<div style='width:500px;height:9px'></div>"), PHONE) as page:
        assert overflow_pixels(page) > 0
