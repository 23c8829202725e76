from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from coreinfer.bundles.errors import CalibrationError, ConfigError
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler import CompileConfig, Progress
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.builtin import Seed, builtin_documents, continue_seeds, load_seeds
from coreinfer.compiler.text.corpus import Corpus, build_corpus, split_into_documents
from coreinfer.compiler.text.given import given_documents

from .model_factory import build_model, build_tokenizer, corpus_texts, save_corpus
from .test_config import make_config


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = build_model("llama")
    family = family_of_config(model.config.to_dict(), "tiny")
    return wrap_model(model, build_tokenizer(), family=family, name="tiny", config=model.config)


def build(loaded: LoadedModel, config: CompileConfig, cache: Path | None = None) -> Corpus:
    with TemporaryDirectory() as name:
        team = Alone(loaded)
        write_builtin = partial(builtin_documents, config, team, Cache(cache), "model", Path(name), Progress())
        return build_corpus(
            config, loaded.record.max_positions, partial(given_documents, config, team, Progress()), write_builtin
        )


@pytest.mark.parametrize("num_tokens", [16, 25, 1000])
def test_texts_are_cut_into_documents(num_tokens: int) -> None:
    tokenizer, text = build_tokenizer(), "\n".join(corpus_texts()[:6])
    ids = tokenizer(text).input_ids
    documents = split_into_documents([text], tokenizer.backend_tokenizer, num_tokens)
    whole = [ids[start : start + num_tokens] for start in range(0, len(ids), num_tokens)]
    assert [list(document.token_ids) for document in documents] == [piece for piece in whole if len(piece) >= 8]
    for document in documents:
        assert document.text == document.routing_text
        assert document.text in text
    if len(whole[-1]) >= 8:
        assert "".join(document.text for document in documents) == text


@pytest.mark.parametrize("text", ["", "hi", "x"])
def test_tiny_texts_are_left_out(text: str) -> None:
    assert split_into_documents([text], build_tokenizer().backend_tokenizer, 32) == []


def file_config(folder: Path, **options: Any) -> CompileConfig:
    path = folder / "corpus.txt"
    return make_config(
        **{"calibration": (str(path if path.exists() else save_corpus(path)),), "clusters": 2, **options}
    )


def test_parts_are_disjoint_and_cover_all_text(loaded: LoadedModel, tmp_path: Path) -> None:
    corpus = build(loaded, file_config(tmp_path))
    parts = [{document.text for document in part} for part in (corpus.calibration, corpus.validation, corpus.held_out)]
    assert [len(part) for part in parts] == [96, 12, 12]
    assert set.union(*parts) == set(corpus_texts())
    assert sum(len(part) for part in parts) == 120


def test_equal_texts_fall_into_the_same_part(loaded: LoadedModel, tmp_path: Path) -> None:
    texts = [text for number, text in enumerate(corpus_texts()[:60]) for _ in range(1 + number % 3)]
    path = tmp_path / "repeated.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    corpus = build(loaded, make_config(calibration=(str(path),), clusters=2))
    parts = [
        Counter(document.text for document in part) for part in (corpus.calibration, corpus.validation, corpus.held_out)
    ]
    assert sum(parts, Counter()) == Counter(texts)
    assert sum(len(part) for part in parts) == 60


def test_splits_follow_the_seed(loaded: LoadedModel, tmp_path: Path) -> None:
    first, again, other = (build(loaded, file_config(tmp_path, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.sha256 != other.sha256
    assert {document.text for document in first.held_out} != {document.text for document in other.held_out}


def test_the_hash_follows_text_and_tokens(loaded: LoadedModel, tmp_path: Path) -> None:
    config = file_config(tmp_path)
    before = build(loaded, config)
    path = Path(config.calibration[0])
    path.write_text(path.read_text().replace("oven", "even", 1))
    assert build(loaded, config).sha256 != before.sha256


@pytest.mark.parametrize("budget", [1000, 2500, 5000])
def test_the_token_budget_is_kept(budget: int, loaded: LoadedModel, tmp_path: Path) -> None:
    corpus = build(loaded, file_config(tmp_path, calibration_tokens=budget))
    longest = max(len(document.token_ids) for document in corpus.calibration)
    assert budget - 2 * longest < corpus.num_tokens <= budget


def test_text_beyond_the_budget_is_spared_for_healing(loaded: LoadedModel, tmp_path: Path) -> None:
    config = file_config(tmp_path, calibration_tokens=1000)
    without, corpus = build(loaded, config), build(loaded, replace(config, heal_steps=1))
    assert without.spare == ()
    assert corpus.spare
    assert corpus.sha256 == without.sha256
    parts = [corpus.calibration, corpus.validation, corpus.held_out]
    used = {document.text for part in parts for document in part}
    assert used.isdisjoint(document.text for document in corpus.spare)
    everything = build(loaded, replace(config, calibration_tokens=10**6, heal_steps=1))
    assert everything.spare == ()
    whole = {
        document.text
        for part in (everything.calibration, everything.validation, everything.held_out)
        for document in part
    }
    assert whole == used | {document.text for document in corpus.spare}


def test_documents_have_at_most_document_tokens(loaded: LoadedModel, tmp_path: Path) -> None:
    corpus = build(loaded, file_config(tmp_path, document_tokens=20))
    lengths = [len(d.token_ids) for part in (corpus.calibration, corpus.validation, corpus.held_out) for d in part]
    assert max(lengths) == 20
    assert min(lengths) >= 8


def test_documents_longer_than_the_model_reads_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    build(loaded, file_config(tmp_path, document_tokens=256))
    with pytest.raises(ConfigError, match="--document-tokens 300: the model reads 256"):
        build(loaded, file_config(tmp_path, document_tokens=300))


@pytest.mark.parametrize(("clusters", "fits"), [(96, True), (97, False), ("auto", True)])
def test_no_more_clusters_than_calibrated_texts(
    clusters: int | str, fits: bool, loaded: LoadedModel, tmp_path: Path
) -> None:
    config = file_config(tmp_path, clusters=clusters)
    if fits:
        assert len(build(loaded, config).calibration) == 96
    else:
        with pytest.raises(CalibrationError, match="--clusters 97: more than the 96 texts"):
            build(loaded, config)


def test_seed_prompts_are_many_and_various() -> None:
    seeds = load_seeds()
    assert len(seeds) >= 400
    assert len({" ".join(seed.prompt.lower().split()) for seed in seeds}) == len(seeds)
    topics = Counter(seed.topic for seed in seeds)
    assert len(topics) >= 20
    assert min(topics.values()) >= 5
    assert {seed.kind for seed in seeds} == {"chat", "text"}
    assert all(seed.prompt == seed.prompt.strip() != "" for seed in seeds)


FEW = tuple(
    Seed(topic="sea", kind=kind, prompt=f"{prompt} {number}")
    for number in range(4)
    for kind, prompt in (("chat", "Why does the ship sail?"), ("text", "The storm was"))
)


@pytest.fixture
def few_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    use_seeds(monkeypatch, FEW)


def use_seeds(monkeypatch: pytest.MonkeyPatch, seeds: tuple[Seed, ...]) -> None:
    monkeypatch.setattr("coreinfer.compiler.text.builtin.load_seeds", lambda: seeds)


def builtin_config(**options: Any) -> CompileConfig:
    return make_config(**{"clusters": 2, "calibration_tokens": 400, "document_tokens": 128, **options})


@pytest.mark.usefixtures("few_seeds")
def test_the_model_continues_every_seed(loaded: LoadedModel, tmp_path: Path) -> None:
    continued = [*continue_seeds(builtin_config(), Alone(loaded), tmp_path, Progress())]
    assert sorted(prompt for prompt, _, _ in continued) == sorted(seed.prompt for seed in FEW)
    kinds = {seed.prompt: seed.kind for seed in FEW}
    for prompt, text, ids in continued:
        assert text.startswith(prompt)
        assert len(ids) <= 128
        opening = loaded.tokenizer.decode(list(ids), skip_special_tokens=False)
        start = f"<|user|>{prompt}</s><|assistant|>" if kinds[prompt] == "chat" else f"<s>{prompt}"
        assert opening.startswith(start)
        assert 2 not in ids[:-1] or kinds[prompt] == "chat"


def test_no_more_seeds_are_continued_than_the_budget_takes(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = tuple(Seed(topic="sea", kind="text", prompt=f"The storm was {number}") for number in range(100))
    use_seeds(monkeypatch, seeds)
    continued = [*continue_seeds(builtin_config(calibration_tokens=800), Alone(loaded), tmp_path, Progress())]
    numbers = [int(prompt.rsplit(maxsplit=1)[1]) for prompt, _, _ in continued]
    assert 10 < len(numbers) < 40
    # From the first to the last, evenly.
    assert numbers == sorted(numbers)
    assert (min(numbers), max(numbers)) == (0, numbers[-1])
    assert numbers[-1] > 90
    assert 0.7 * 800 < sum(len(ids) for _, _, ids in continued) < 1.3 * 800


@pytest.mark.usefixtures("few_seeds")
def test_continuations_follow_the_seed(loaded: LoadedModel, tmp_path: Path) -> None:
    configs = [builtin_config(seed=seed, threads=2) for seed in (1, 1, 2)]
    first, again, other = ([*continue_seeds(config, Alone(loaded), tmp_path, Progress())] for config in configs)
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("few_seeds")
def test_builtin_documents_are_routed_by_their_prompts(loaded: LoadedModel) -> None:
    corpus = build(loaded, builtin_config(calibration_tokens=1000))
    documents = [*corpus.calibration, *corpus.validation, *corpus.held_out]
    assert {document.routing_text for document in documents} == {seed.prompt for seed in FEW}
    assert all(document.has_prompt and document.text.startswith(document.routing_text) for document in documents)


@pytest.mark.usefixtures("few_seeds")
def test_builtin_text_is_written_once(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = builtin_config(calibration_tokens=1000)
    first = build(loaded, config, tmp_path)
    monkeypatch.setattr("coreinfer.compiler.text.builtin.continue_seeds", _must_not_run)
    assert build(loaded, replace(config, clusters=3), tmp_path) == first
    for change in ({"seed": 5}, {"threads": 3}):
        with pytest.raises(AssertionError, match="written again"):
            build(loaded, replace(config, **change), tmp_path)  # type: ignore[arg-type]
    use_seeds(monkeypatch, FEW[:6])
    with pytest.raises(AssertionError, match="written again"):
        build(loaded, config, tmp_path)


def _must_not_run(*args: object) -> object:
    raise AssertionError("written again")


@pytest.mark.usefixtures("few_seeds")
@pytest.mark.parametrize("document_tokens", [16, 40, 100])
def test_continuations_keep_within_document_tokens(document_tokens: int, loaded: LoadedModel, tmp_path: Path) -> None:
    config = builtin_config(document_tokens=document_tokens, calibration_tokens=5000)
    lengths = [len(ids) for _, _, ids in continue_seeds(config, Alone(loaded), tmp_path, Progress())]
    assert document_tokens // 2 < max(lengths) <= document_tokens


@pytest.mark.usefixtures("few_seeds")
def test_files_and_builtin_text_together(loaded: LoadedModel, tmp_path: Path) -> None:
    calibration = (str(save_corpus(tmp_path / "corpus.txt")), "builtin")
    corpus = build(loaded, builtin_config(calibration=calibration, calibration_tokens=100_000))
    documents = [*corpus.calibration, *corpus.validation, *corpus.held_out]
    assert sum(document.has_prompt for document in documents) == len(FEW)
    assert len({document.text for document in documents if not document.has_prompt}) >= 120
