"""The page at /, in headless Chromium against a running server.

The pictures in docs/images come from here too, with a bundle that can speak:

    COREINFER_BUNDLE=build/demo-bundle COREINFER_SCREENSHOTS=docs/images pytest tests/test_server_page.py -k looks
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .browser import SCREENS, Screen, overflow_pixels, visit
from .model_factory import corpus_texts
from .server_process import RunningServer, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUESTION = "How do I make a simple tomato soup with basil?"
NUM_TOKENS = 40
WAIT_MILLISECONDS = 30_000


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return Path(os.environ.get("COREINFER_BUNDLE") or tiny_bundle("llama"))


@pytest.fixture(scope="module")
def server(bundle: Path, browser: "Browser") -> Iterator[RunningServer]:
    # Chromium first: without it there is nothing to serve. Two turns have room in the tiny model's 256 tokens.
    with serving(bundle, "--max-new-tokens", 60) as running:
        yield running


@pytest.fixture(scope="module")
def slow_server(bundle: Path, browser: "Browser") -> Iterator[RunningServer]:
    with serving(bundle, key="sesame", token_seconds=0.05) as running:
        yield running


def ask(page: "Page", text: str) -> None:
    page.locator("#cluster-0").wait_for(state="attached")
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")


def wait_for_answer(page: "Page", number: int = 1) -> str:
    """Wait until so many answers are whole; returns the figures of the last."""
    figures = page.locator(".turn.assistant .figures")
    page.locator("#send").wait_for(state="visible", timeout=WAIT_MILLISECONDS)
    assert page.locator(".turn.assistant").count() == number
    return figures.nth(number - 1).inner_text()


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.name)
def test_the_page_looks_as_it_should(
    screen: Screen, browser: "Browser", server: RunningServer, screenshots: Path
) -> None:
    with visit(browser, server.url, screen) as page:
        ask(page, QUESTION)
        wait_for_answer(page)
        ask(page, "Which herbs go with it?")
        wait_for_answer(page, 2)
        assert overflow_pixels(page) == 0
        assert page.locator("#text").is_visible()
        assert page.locator("#map").is_visible()
        box = page.locator("#send").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= screen.height
        page.screenshot(path=screenshots / f"page-{screen.name}.png")
        assert (screenshots / f"page-{screen.name}.png").stat().st_size < 150_000


def test_an_answer_comes_with_its_cluster_and_place(browser: "Browser", server: RunningServer, bundle: Path) -> None:
    text = corpus_texts()[0]
    place = server.post("/coreinfer/place", json={"model": bundle.name, "text": text}).json()
    with visit(browser, server.url) as page:
        ask(page, text)
        told = wait_for_answer(page)
        assert re.search(r"cluster \d+ \(.+\) · distance \d\.\d{3}.* · mode \w+ · .*\d+\.\d tok/s", told)
        assert f"distance {place['distance']:.3f}" in told
        assert page.locator("#place circle").count() == 1
        assert page.locator("circle.near").get_attribute("id") == f"cluster-{place['cluster']}"
        assert page.locator("li.near .label").inner_text() == place["label"]
        assert f"distance {place['distance']:.3f}" in page.locator("#about").inner_text()


def test_the_conversation_is_sent_whole_and_answers_are_the_servers(
    browser: "Browser", server: RunningServer, bundle: Path
) -> None:
    first, second = corpus_texts()[:2]
    messages = [{"role": "user", "content": first}]
    with visit(browser, server.url) as page:
        page.locator("#tokens").fill(str(NUM_TOKENS))
        for number, text in enumerate((first, second), start=1):
            ask(page, text)
            wait_for_answer(page, number)
            body = {"model": bundle.name, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}
            expected = server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            assert page.locator(".turn.assistant .text").nth(number - 1).text_content() == expected
            messages += [{"role": "assistant", "content": expected}, {"role": "user", "content": second}]
        page.locator("#new").click()
        assert page.locator(".turn").count() == 0


def test_text_of_users_and_models_is_never_markup(browser: "Browser", server: RunningServer) -> None:
    with visit(browser, server.url) as page:
        ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
        wait_for_answer(page)
        assert page.locator("#talk img, #talk b").count() == 0
        assert page.locator(".turn.user .text").inner_text() == "<img src=x onerror=alert(1)><b>bold</b>"


def stop_an_answer(browser: "Browser", server: RunningServer) -> None:
    with visit(browser, server.url) as page:
        page.get_by_text("This server asks for a key.").wait_for()
        page.locator("#key").fill("sesame")
        page.keyboard.press("Tab")
        ask(page, QUESTION)
        # It streams: text is there long before the answer is whole.
        answer = page.locator(".turn.assistant .text")
        while len(answer.text_content() or "") < 6:
            page.wait_for_timeout(50)
        page.locator("#stop").click()
        page.get_by_text("stopped", exact=True).wait_for()
        assert page.locator("#send").is_visible()
        length = len(answer.text_content() or "")
        page.wait_for_timeout(300)
        assert len(answer.text_content() or "") == length


def test_a_key_is_asked_for_and_answers_can_be_stopped(browser: "Browser", slow_server: RunningServer) -> None:
    # The one request that fails is the one that was stopped.
    with pytest.raises(AssertionError, match=r"^failed: \S+/v1/chat/completions \(net::ERR_ABORTED\)$"):
        stop_an_answer(browser, slow_server)


def test_the_page_may_run_and_load_nothing_else(server: RunningServer) -> None:
    response = server.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    assert "http" not in policy
    assert not re.search(r"(src|href)=.(?!data:)", response.text)
