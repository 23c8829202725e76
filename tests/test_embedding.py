import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.machine import bf16_products_are_faster
from coreinfer.compiler import CompileConfig, Progress
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.clusters.distil import distill_encoder
from coreinfer.compiler.clusters.embed import (
    StaticEncoder,
    embed_sentences,
    fit_to_sentences,
    in_few_dimensions,
    load_encoder,
)
from coreinfer.compiler.models.sources import ModelSource, find_source
from coreinfer.compiler.team.alone import Alone
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from .model_factory import corpus_texts
from .test_carrying import load as load_family

TEXTS = (*corpus_texts()[:7], "wave", " ".join(corpus_texts()[:2]), "")
TEAM = Alone(load_family("llama"))
ROUNDING = 1e-2 if bf16_products_are_faster() else 1e-5


@pytest.fixture(scope="module")
def encoder(tiny_inputs: Callable[[str], CompileConfig]) -> SentenceTransformer:
    return load_encoder(find_source(str(tiny_inputs("llama").encoder)), "cpu")


@pytest.fixture(scope="module")
def static(encoder: SentenceTransformer) -> StaticEncoder:
    return distill_encoder(TEAM, lambda: encoder, "key", Cache(None), Progress())


def not_again() -> NoReturn:
    pytest.fail("the encoder must not be loaded for a stored result")


def test_sentences_are_embedded_in_their_order_whatever_the_batch(
    encoder: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreinfer.compiler.clusters.embed._BATCH_SIZE", 3)
    progress = Progress()
    found = embed_sentences(TEAM, lambda: encoder, "key", TEXTS, Cache(None), progress)
    alone = [encoder.encode([text], normalize_embeddings=True, show_progress_bar=False)[0] for text in TEXTS]
    np.testing.assert_allclose(found, np.stack(alone), atol=ROUNDING)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found.dtype == np.float32
    assert [*progress.stage_seconds] == ["embed"]


def test_stored_embeddings_need_no_encoder(encoder: SentenceTransformer, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = embed_sentences(TEAM, lambda: encoder, "key", TEXTS, cache, Progress())
    np.testing.assert_array_equal(embed_sentences(TEAM, not_again, "key", TEXTS, cache, Progress()), first)
    reordered = embed_sentences(TEAM, lambda: encoder, "key", TEXTS[::-1], cache, Progress())
    np.testing.assert_allclose(reordered, first[::-1], atol=ROUNDING)
    embed_sentences(TEAM, lambda: encoder, "other encoder", TEXTS, cache, Progress())
    assert len([*tmp_path.iterdir()]) == 3


def test_a_distilled_encoder_is_stored_and_always_the_same(
    encoder: SentenceTransformer, static: StaticEncoder, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    for load in (lambda: encoder, not_again):
        again = distill_encoder(TEAM, load, "key", cache, Progress())
        np.testing.assert_array_equal(again.table, static.table)
        assert again.tokenizer_json == static.tokenizer_json


@pytest.mark.parametrize("lost", ["distil-*.safetensors", "distil-tokenizer-*.json"])
def test_half_of_a_distilled_encoder_is_made_again(
    lost: str, encoder: SentenceTransformer, static: StaticEncoder, tmp_path: Path
) -> None:
    cache = Cache(tmp_path)
    distill_encoder(TEAM, lambda: encoder, "key", cache, Progress())
    (path,) = tmp_path.glob(lost)
    path.unlink()
    again = distill_encoder(TEAM, lambda: encoder, "key", cache, Progress())
    np.testing.assert_array_equal(again.table, static.table)
    assert again.tokenizer_json == static.tokenizer_json
    assert path.exists()


def test_the_table_fits_its_tokenizer(static: StaticEncoder) -> None:
    tokenizer = Tokenizer.from_str(static.tokenizer_json)
    assert static.table.shape == (tokenizer.get_vocab_size(), 32)
    assert static.table.dtype == np.float16
    stored = json.loads(static.tokenizer_json)
    assert stored["truncation"] is None
    assert stored["padding"] is None
    long = "wave ship harbour " * 400
    assert len(tokenizer.encode(long, add_special_tokens=False).ids) >= 1200


def test_a_text_is_the_mean_of_its_rows(static: StaticEncoder) -> None:
    tokenizer = Tokenizer.from_str(static.tokenizer_json)
    found = static.embed(TEXTS[:9])
    for text, vector in zip(TEXTS[:9], found, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        mean = static.table[ids].astype(np.float32).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-4)


@pytest.mark.parametrize("text", ["", "   "])
def test_texts_without_tokens_are_finite(text: str, static: StaticEncoder) -> None:
    assert np.isfinite(static.embed([text, "wave"])).all()


def cosines(static: StaticEncoder, texts: tuple[str, ...], targets: npt.NDArray[np.float32]) -> float:
    return float((static.embed(texts) * targets).sum(axis=1).mean())


def test_fitting_brings_the_table_nearer_to_the_sentence_encoder(
    encoder: SentenceTransformer, static: StaticEncoder
) -> None:
    texts = corpus_texts()
    targets = embed_sentences(TEAM, lambda: encoder, "key", texts, Cache(None), Progress())
    fitted = fit_to_sentences(static, texts[:80], targets[:80])
    assert fitted.table.shape == (len(static.table), targets.shape[1])
    assert fitted.tokenizer_json == static.tokenizer_json
    assert cosines(fitted, texts[80:], targets[80:]) > cosines(static, texts[80:], targets[80:]) + 0.1


def test_fitting_equals_ridge_regression_of_means(static: StaticEncoder) -> None:
    texts = corpus_texts()[:50]
    generator = np.random.default_rng(0)
    targets = generator.normal(size=(50, 7)).astype(np.float32)
    tokenizer = Tokenizer.from_str(static.tokenizer_json)
    table = static.table.astype(np.float64)
    means = np.stack([table[tokenizer.encode(text, add_special_tokens=False).ids].mean(axis=0) for text in texts])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    penalty = np.sqrt(0.2 * 50 / 32) * np.eye(32)
    system, right = np.vstack([means, penalty]), np.vstack([targets, np.zeros((32, 7))])
    expected = table @ np.linalg.lstsq(system, right, rcond=None)[0]
    fitted = fit_to_sentences(static, texts, targets).table.astype(np.float64)
    np.testing.assert_allclose(fitted, expected * np.abs(fitted).max() / np.abs(expected).max(), atol=0.1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 6e4])
def test_fitted_tables_fit_half_precision(scale: float, static: StaticEncoder) -> None:
    small = np.clip(static.table.astype(np.float32) * scale, -6e4, 6e4).astype(np.float16)
    targets = np.random.default_rng(1).normal(size=(20, 32)).astype(np.float32)
    fitted = fit_to_sentences(
        StaticEncoder(table=small, tokenizer_json=static.tokenizer_json), corpus_texts()[:20], targets
    )
    assert np.isfinite(fitted.table).all()
    assert np.abs(fitted.table).max() == pytest.approx(100, rel=0.01)


def test_a_text_without_tokens_does_not_spoil_the_fit(static: StaticEncoder) -> None:
    targets = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    fitted = fit_to_sentences(static, ["wave ship", "", "court judge"], targets)
    assert np.isfinite(fitted.table).all()


def test_a_table_in_few_dimensions_keeps_what_texts_and_rows_differ_in() -> None:
    """Of 24 directions 8 have nearly all of it: cosines are those of before, and without these 8 they are not."""
    generator, tokenizer = np.random.default_rng(2), word_tokenizer(300)
    strong = generator.normal(size=(300, 8)) @ generator.normal(size=(8, 24))
    table = (strong + 0.01 * generator.normal(size=(300, 24))).astype(np.float16)
    encoder = StaticEncoder(table=table, tokenizer_json=tokenizer)
    texts = [" ".join(f"w{i}" for i in generator.integers(0, 300, 12)) for _ in range(40)]
    others = [" ".join(f"w{i}" for i in generator.integers(0, 300, 5)) for _ in range(40)]
    whole = encoder.embed(others) @ encoder.embed(texts).T
    few, fewer = in_few_dimensions(encoder, texts, 8), in_few_dimensions(encoder, texts, 4)
    assert (few.table.shape, few.table.dtype.name, few.tokenizer_json) == ((300, 8), "float16", tokenizer)
    np.testing.assert_allclose(few.embed(others) @ few.embed(texts).T, whole, atol=0.01)
    assert np.abs(fewer.embed(others) @ fewer.embed(texts).T - whole).max() > 0.1
    assert in_few_dimensions(encoder, texts, 24) is encoder


def test_what_no_text_says_is_kept_where_the_table_has_it() -> None:
    """Texts use half of the rows and of the directions; other texts may use the rest."""
    table = np.zeros((200, 64), dtype=np.float16)
    table[:100, :4] = np.random.default_rng(3).normal(size=(100, 4))
    table[100:, 4:8] = np.random.default_rng(4).normal(size=(100, 4))
    encoder = StaticEncoder(table=table, tokenizer_json=word_tokenizer(200))
    texts, others = (
        [" ".join(f"w{(7 * i + 3 * j) % 100 + start}" for j in range(5)) for i in range(30)] for start in (0, 100)
    )
    kept = in_few_dimensions(encoder, texts, 8)
    np.testing.assert_allclose(
        kept.embed(others) @ kept.embed(others).T, encoder.embed(others) @ encoder.embed(others).T, atol=0.01
    )


def word_tokenizer(count: int) -> str:
    """A tokenizer of the words w0, w1 and so on, whose ids are these numbers."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return str(tokenizer.to_str())


def test_a_gguf_file_is_no_sentence_encoder() -> None:
    with pytest.raises(ConfigError, match="--encoder tiny: a GGUF file; expected a sentence-transformers folder"):
        load_encoder(ModelSource(name="tiny", location="/", gguf_file="tiny.gguf"), "cpu")


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_folders_that_are_no_encoder(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="no sentence encoder can be loaded") as caught:
        load_encoder(find_source(str(tmp_path), option="--encoder"), "cpu")
    assert "\n" not in str(caught.value)
