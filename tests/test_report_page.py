"""The report as a browser shows it: from a file, on a desktop and a phone, light and dark."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.compiler.report.map_points import MapPoint
from coreinfer.compiler.report.write import write_report

from .browser import SCREENS, Screen, overflow_pixels, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "</title></svg><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("llama", report_sentences=12) / "report.html"


@pytest.fixture
def manifest(report: Path) -> Manifest:
    return read_manifest(report.parent)


def said(page: "Page") -> str:
    return page.locator("#said").inner_text()


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.name)
def test_it_fits_each_screen_and_complains_of_nothing(
    screen: Screen, browser: "Browser", report: Path, screenshots: Path
) -> None:
    with visit(browser, report.as_uri(), screen) as page:
        assert overflow_pixels(page) == 0
        shade = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (shade < 128) == (screen.colors == "dark")
        picture = page.screenshot(full_page=True, path=screenshots / f"report-{screen.name}.png")
        assert picture.startswith(b"\x89PNG")


def test_long_words_do_not_widen_a_phones_page(browser: "Browser", manifest: Manifest, tmp_path: Path) -> None:
    long = "unbreakable" * 40
    clusters = tuple(replace(cluster, label=long, examples=(long,)) for cluster in manifest.clusters)
    point = MapPoint(cluster=0, x=0.0, y=0.0, text=long)
    named = replace(manifest, clusters=clusters, model=replace(manifest.model, name=long))
    write_report(tmp_path / "report.html", named, [point])
    with visit(browser, (tmp_path / "report.html").as_uri(), SCREENS[2]) as page:
        page.locator(".cluster").first.focus()
        assert long in said(page)
        assert overflow_pixels(page) == 0


def test_pointing_at_a_dot_shows_its_sentence(browser: "Browser", manifest: Manifest, tmp_path: Path) -> None:
    points = [MapPoint(cluster=1, x=3.0, y=3.0, text="Soup is warm."), MapPoint(cluster=0, x=-3.0, y=3.0, text=None)]
    write_report(tmp_path / "report.html", manifest, points)
    with visit(browser, (tmp_path / "report.html").as_uri()) as page:
        assert "Point at a dot" in said(page)
        page.locator("#map").scroll_into_view_if_needed()
        first, second = (page.locator(".dot").nth(number).bounding_box() for number in (0, 1))
        assert first
        assert second
        page.mouse.move(first["x"] + first["width"] / 2, first["y"] + first["height"] / 2)
        assert said(page) == f"1. {manifest.clusters[1].label}\nSoup is warm."
        # A near miss is enough: dots are small.
        page.mouse.move(second["x"] - 4, second["y"] - 4)
        assert said(page) == f"0. {manifest.clusters[0].label}\n(sentence not in this report)"


def test_the_keyboard_reaches_clusters_and_their_sentences(
    browser: "Browser", manifest: Manifest, tmp_path: Path
) -> None:
    points = [MapPoint(cluster=1, x=0.0, y=float(number), text=f"Sentence {number}.") for number in range(2)]
    write_report(tmp_path / "report.html", manifest, points)
    with visit(browser, (tmp_path / "report.html").as_uri()) as page:
        label = [f"{index}. {cluster.label}" for index, cluster in enumerate(manifest.clusters)]
        page.keyboard.press("Tab")
        assert said(page).startswith(f"{label[0]}\n{manifest.clusters[0].examples[0]}")
        page.keyboard.press("Tab")
        assert said(page).startswith(label[1])
        for number in range(2):
            page.keyboard.press("ArrowRight")
            assert said(page) == f"{label[1]}\nSentence {number}."
        page.keyboard.press("ArrowRight")
        assert said(page).startswith(f"{label[1]}\n{manifest.clusters[1].examples[0]}")


def test_a_tap_shows_a_sentence(browser: "Browser", report: Path) -> None:
    with visit(browser, report.as_uri(), SCREENS[2]) as page:
        page.locator(".dot").first.scroll_into_view_if_needed()
        box = page.locator(".dot").first.bounding_box()
        assert box
        page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert "Point at a dot" not in said(page)


def test_without_scripts_the_map_has_tooltips(browser: "Browser", report: Path, manifest: Manifest) -> None:
    with visit(browser, report.as_uri(), script=False) as page:
        assert page.locator("#map title").count() == 12 + len(manifest.clusters)
        assert page.locator("#map .cluster title").first.text_content() == "\n".join(
            [f"0. {manifest.clusters[0].label}", *manifest.clusters[0].examples]
        )


def test_markup_in_labels_does_not_run(browser: "Browser", manifest: Manifest, tmp_path: Path) -> None:
    clusters = tuple(replace(cluster, label=HOSTILE, examples=(HOSTILE,)) for cluster in manifest.clusters)
    point = MapPoint(cluster=0, x=0.0, y=0.0, text=HOSTILE)
    write_report(tmp_path / "report.html", replace(manifest, clusters=clusters), [point])
    with visit(browser, (tmp_path / "report.html").as_uri()) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"a dialog says {dialog.message}"))
        page.locator(".cluster").first.focus()
        assert HOSTILE in said(page)
        assert page.locator("img").count() == 0
