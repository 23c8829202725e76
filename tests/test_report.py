import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.compiler.report import write_report

HOSTILE = '<script>alert("1")</script> & <img src=http://evil.example/x>'
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether its tags close as they opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def manifest(tiny_bundle: Callable[..., Path]) -> Manifest:
    return read_manifest(tiny_bundle("llama"))


def render(manifest: Manifest, folder: Path) -> Page:
    write_report(folder / "report.html", manifest)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def with_texts(manifest: Manifest, text: str) -> Manifest:
    clusters = tuple(replace(cluster, label=text, examples=(text, text)) for cluster in manifest.clusters)
    return replace(manifest, clusters=clusters, model=replace(manifest.model, name=text))


def test_the_page_of_a_bundle_is_self_contained(tiny_bundle: Callable[..., Path]) -> None:
    html = (tiny_bundle("llama") / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_page_says_what_was_compiled(manifest: Manifest, tmp_path: Path) -> None:
    text = render(manifest, tmp_path).text
    for cluster in manifest.clusters:
        assert cluster.label in text
        assert all(example in text for example in cluster.examples)
    assert manifest.quality
    for score in (manifest.quality.dense, manifest.quality.clusters, *manifest.quality.controls):
        assert f"{score.name}{score.perplexity:.2f}{score.kl:.3f}{score.top1:.3f}" in text
    assert manifest.provenance.model_sha256 in text
    assert manifest.provenance.corpus_sha256 in text


def test_other_peoples_text_stays_text(manifest: Manifest, tmp_path: Path) -> None:
    page = render(with_texts(manifest, HOSTILE), tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(HOSTILE) == 4 * len(manifest.clusters) + 2
    assert not page.open


def test_circles_lie_on_the_map_and_follow_the_sentences(manifest: Manifest, tmp_path: Path) -> None:
    sizes = (100, 25, 4, 1)
    placed = tuple(
        replace(cluster, num_sentences=size, map_x=float(index), map_y=-float(index))
        for index, (cluster, size) in enumerate(zip(manifest.clusters, sizes, strict=True))
    )
    page = render(replace(manifest, clusters=placed), tmp_path)
    by_name = {name: [float(str(value)) for key, value in page.attributes if key == name] for name in ("cx", "cy", "r")}
    assert by_name["cx"] == sorted(by_name["cx"])
    assert by_name["cy"] == sorted(by_name["cy"], reverse=True)
    assert by_name["r"] == sorted(by_name["r"], reverse=True)
    assert len(set(by_name["r"])) == 4
    for x, y, radius in zip(by_name["cx"], by_name["cy"], by_name["r"], strict=True):
        assert radius <= x <= 400 - radius
        assert radius <= y <= 240 - radius


@pytest.mark.parametrize("options", [{"clusters": 1}, {"evaluate": False}, {"reconstruct": False}])
def test_pages_of_other_bundles(options: dict[str, bool | int], tiny_bundle: Callable[..., Path]) -> None:
    page = Page((tiny_bundle("llama", **options) / "report.html").read_text(encoding="utf-8"))
    assert ("Quality on held-out text" in page.text) == options.get("evaluate", True)
    assert ("not repaired" in page.text) != options.get("reconstruct", True)
    assert page.tags.count("circle") == options.get("clusters", 4)
