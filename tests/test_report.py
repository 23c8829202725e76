import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler.report.map_points import MapPoint
from coreinfer.compiler.report.write import file_sizes, write_report

HOSTILE = '<script>alert("1")</script> & <img src=http://evil.example/x>'
VOID = {"meta", "br", "img", "link", "hr", "input"}
POINTS = [
    MapPoint(cluster=0, x=0.1, y=0.2, text="A sentence about soup."),
    MapPoint(cluster=1, x=-0.3, y=0.1, text=None),
]


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


def render(manifest: Manifest, folder: Path, points: Sequence[MapPoint] = ()) -> Page:
    write_report(folder / "report.html", manifest, points)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def with_texts(manifest: Manifest, text: str) -> Manifest:
    clusters = tuple(replace(cluster, label=text, examples=(text, text)) for cluster in manifest.clusters)
    return replace(manifest, clusters=clusters, model=replace(manifest.model, name=text))


def test_the_page_of_a_bundle_is_self_contained(tiny_bundle: Callable[..., Path]) -> None:
    html = (tiny_bundle("llama") / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert not page.open
    assert not {"link", "img", "iframe", "form"} & set(page.tags)
    assert not {"src", "href", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_policy_lets_the_pages_own_script_run_and_nothing_else(manifest: Manifest, tmp_path: Path) -> None:
    page = render(manifest, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(str(value) for name, value in page.attributes if name == "content" and "default-src" in str(value))
    assert policy.startswith(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';")
    assert page.tags.count("script") == 1


def test_the_page_says_what_was_compiled(manifest: Manifest, tmp_path: Path) -> None:
    text = render(manifest, tmp_path).text
    for cluster in manifest.clusters:
        assert cluster.label in text
        assert all(example in text for example in cluster.examples)
    assert manifest.quality
    for score in (manifest.quality.dense, manifest.quality.clusters, *manifest.quality.controls):
        for figure in (f"{score.kl:.3f}", f"{score.perplexity:.2f}", f"{score.top1:.3f}"):
            assert f"{score.name}{figure}" in text
    for entry in manifest.quality.per_cluster:
        assert f"KL{entry.score.kl:.3f}" in text
    for layer, (budget, ridge) in enumerate(zip(manifest.plan.layer_budgets, manifest.plan.ridges, strict=True)):
        assert f"{layer}{budget}{budget / manifest.model.ffn_dim:.2f}{ridge or 'no repair'}" in text
    assert manifest.provenance.model_sha256 in text
    assert manifest.provenance.corpus_sha256 in text


def test_speed_is_bandwidth_by_bytes(manifest: Manifest, tmp_path: Path) -> None:
    text = render(manifest, tmp_path).text
    weights = token_bytes(manifest)
    for rate in (10, 20, 40, 80):
        assert f"{rate} GB/s{rate * 1e9 / weights.pack:.0f}{rate * 1e9 / weights.dense:.0f}\n" in text
    assert "An upper bound, not a measurement" in text


def test_the_files_of_the_bundle_are_listed(tiny_bundle: Callable[..., Path]) -> None:
    bundle = tiny_bundle("llama")
    text = Page((bundle / "report.html").read_text(encoding="utf-8")).text
    files = read_manifest(bundle).files
    assert files.keys() | {"manifest.json"} == file_sizes(bundle).keys()
    for name, record in files.items():
        size = f"{record.bytes / 1e6:.1f} MB" if record.bytes >= 1e5 else f"{record.bytes / 1e3:.1f} kB"
        assert (f"{name}{size}" in text) == (name != "report.html")


def test_other_peoples_text_stays_text(manifest: Manifest, tmp_path: Path) -> None:
    points = [MapPoint(cluster=0, x=0.0, y=0.0, text=HOSTILE)]
    page = render(with_texts(manifest, HOSTILE), tmp_path, points)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    # A cluster says its label and two examples on the map and in its panel, the model its name in title and heading.
    assert page.text.count(HOSTILE) == 6 * len(manifest.clusters) + 2 + 2
    assert not page.open


def test_only_sentences_that_may_be_shown_are(manifest: Manifest, tmp_path: Path) -> None:
    text = render(manifest, tmp_path, POINTS).text
    assert "A sentence about soup." in text
    assert "(sentence not in this report)" in text
    assert "The text of 1 of the 2 is not in this" in text
    assert "is not in this" not in render(manifest, tmp_path, POINTS[:1]).text


def test_equal_input_gives_equal_bytes(manifest: Manifest, tmp_path: Path) -> None:
    pages = set()
    for _ in range(2):
        write_report(tmp_path / "report.html", manifest, POINTS, {"a": 1})
        pages.add((tmp_path / "report.html").read_bytes())
    assert len(pages) == 1


def test_rings_lie_on_the_map_and_follow_the_sentences(manifest: Manifest, tmp_path: Path) -> None:
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
        assert radius <= y <= 280 - radius


@pytest.mark.parametrize(
    "options", [{"clusters": 1}, {"evaluate": False}, {"reconstruct": False}, {"report_sentences": 5}]
)
def test_pages_of_other_bundles(options: dict[str, bool | int], tiny_bundle: Callable[..., Path]) -> None:
    page = Page((tiny_bundle("llama", **options) / "report.html").read_text(encoding="utf-8"))
    classes = [value for name, value in page.attributes if name == "class"]
    assert ("Quality on held-out text" in page.text) == options.get("evaluate", True)
    assert ("not repaired" in page.text) != options.get("reconstruct", True)
    assert classes.count("cluster") == options.get("clusters", 4)
    # Text that was given is not shown unless it was asked for.
    assert ("(sentence not in this report)" in page.text) == ("report_sentences" not in options)
    assert (classes.count("dot") == 5) == ("report_sentences" in options)
