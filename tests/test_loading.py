"""Loading: the tokenizer is parsed while files are hashed, and whatever is wrong is said as if it were not."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles import BundleCorrupt, BundleNotFound, open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime import engine as loading
from coreinfer.runtime.prompts.prompt_format import PromptFormat, read_tokenizer

from .bundle_factory import flip_bit, list_again
from .model_factory import corpus_texts


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does with a bundle, the thread that worked while files were hashed is gone after it."""
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("coreinfer-load")]


def loading_error(bundle_dir: Path) -> str:
    with pytest.raises(BundleCorrupt) as caught:
        runtime.load(bundle_dir, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_tokenizer_is_parsed_while_files_are_hashed(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def meet(function: Callable[..., Any]) -> Callable[..., Any]:
        def after_the_other_began(*args: Any, **options: Any) -> Any:
            meeting.wait()
            return function(*args, **options)

        return after_the_other_began

    monkeypatch.setattr(loading, "read_tokenizer", meet(read_tokenizer))
    monkeypatch.setattr(loading, "open_bundle", meet(open_bundle))
    engine = runtime.load(bundle_copy, device="cpu")
    text = corpus_texts()[0]
    assert engine.tokenizer.encode(text).ids == PromptFormat(engine.bundle).tokenizer.encode(text).ids


def test_a_damaged_tokenizer_is_one_problem_of_the_bundle(bundle_copy: Path) -> None:
    (bundle_copy / LAYOUT.tokenizer).write_text("no JSON", encoding="utf-8")
    flip_bit(bundle_copy / LAYOUT.base)
    with pytest.raises(BundleCorrupt) as expected:
        open_bundle(bundle_copy, lazy_packs=True)
    message = loading_error(bundle_copy)
    assert message == str(expected.value)
    assert f"{LAYOUT.tokenizer}: expected" in message
    assert f"{LAYOUT.base}: expected sha256" in message
    assert "parsed" not in message


@pytest.mark.parametrize("content", [b"no JSON", b"\xff{}", b""])
def test_a_listed_tokenizer_that_cannot_be_parsed_is_named(content: bytes, bundle_copy: Path) -> None:
    (bundle_copy / LAYOUT.tokenizer).write_bytes(content)
    list_again(bundle_copy)
    message = loading_error(bundle_copy)
    assert message.startswith(f"{bundle_copy / LAYOUT.tokenizer}: cannot be parsed (")
    assert message.endswith("); compile the bundle again")


def test_a_missing_tokenizer_is_missing(bundle_copy: Path) -> None:
    (bundle_copy / LAYOUT.tokenizer).unlink()
    assert f"{LAYOUT.tokenizer}: missing" in loading_error(bundle_copy)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_for(bundle_copy: Path) -> None:
    (bundle_copy / LAYOUT.tokenizer).unlink()
    os.mkfifo(bundle_copy / LAYOUT.tokenizer)
    assert f"{LAYOUT.tokenizer}: is no file" in loading_error(bundle_copy)


def test_no_bundle_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound):
        runtime.load(tmp_path / "nowhere")
