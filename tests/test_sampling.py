"""Sampling against the logits processors of transformers, and by the frequencies of its draws."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles.errors import ConfigError, CoreInferError
from coreinfer.runtime.decoding.sampling import Sampler, SamplingParams, distribution
from hypothesis import given
from hypothesis import strategies as st

Logits = npt.NDArray[np.float32]
Reference = Callable[[Logits, SamplingParams, list[int]], npt.NDArray[np.float64]]

SETTINGS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.1, 0.7, 1.0, 3.0), (0, 1, 7, 5000), (0.05, 0.5, 0.9, 1.0), (0.0, 0.02, 0.3, 1.0), (0.8, 1.0, 1.3)
    )
]


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch = pytest.importorskip("torch")
    processes = pytest.importorskip("transformers.generation.logits_process")

    def probabilities(logits: Logits, params: SamplingParams, seen: list[int]) -> npt.NDArray[np.float64]:
        # In double precision, as ours: a float32 sum can land on the other side of top_p.
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        seen_ids = torch.tensor([seen], dtype=torch.int64)
        for process in _processors(processes, params):
            scores = process(seen_ids, scores)
        return np.asarray(scores.softmax(dim=-1)[0].numpy())

    return probabilities


def _processors(processes: Any, params: SamplingParams) -> list[Any]:
    """The list that transformers' `GenerationMixin._get_logits_processor` makes of the same settings."""
    return [
        *([processes.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)] * (params.repetition_penalty != 1)),
        processes.TemperatureLogitsWarper(params.temperature),
        *([processes.TopKLogitsWarper(params.top_k)] if params.top_k else []),
        *([processes.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []),
        *([processes.MinPLogitsWarper(params.min_p)] if params.min_p else []),
    ]


def _logits(seed: int, vocab_size: int = 200, scale: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(vocab_size) * scale).astype(np.float32)


@pytest.mark.parametrize("params", SETTINGS[:: len(SETTINGS) // 24], ids=str)
def test_the_callers_logits_stay_as_they_are(params: SamplingParams) -> None:
    logits = _logits(0)
    Sampler(params, [3, 5]).sample(logits)
    assert np.array_equal(logits, _logits(0))


@pytest.mark.parametrize("vocab_size", [1, 2, 200, 1021])
def test_distribution_is_that_of_transformers(reference: Reference, vocab_size: int) -> None:
    for number, params in enumerate(SETTINGS):
        logits = _logits(number, vocab_size, scale=(0.5, 3.0, 12.0)[number % 3])
        seen = np.random.default_rng(number).integers(0, vocab_size, size=number % 5 * 10 + 1).tolist()
        expected = reference(logits, params, seen)
        got = distribution(logits, params, seen)
        assert np.array_equal(got > 0, expected > 0), params
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-300, err_msg=str(params))


def test_distribution_with_ties_and_masked_tokens_is_that_of_transformers(reference: Reference) -> None:
    logits = np.asarray([1, 1, 1, 0, -np.inf, 2, 2, -np.inf, -1, 0], dtype=np.float32)
    for params in SETTINGS:
        expected = reference(logits, params, [0, 3, 4])
        # Which of equal tokens top-p drops depends on torch's sort; how many it drops does not.
        got = distribution(logits, params, [0, 3, 4])
        np.testing.assert_allclose(np.sort(got), np.sort(expected), rtol=1e-9, err_msg=str(params))


def test_a_full_vocabulary_is_cut_as_by_transformers(reference: Reference) -> None:
    logits = _logits(1, 151_936)
    for params in (
        SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
        SamplingParams(temperature=1.2, top_p=0.97),
    ):
        expected = reference(logits, params, list(range(500)))
        got = distribution(logits, params, range(500))
        assert np.count_nonzero(got) == np.count_nonzero(expected)
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    temperature=st.one_of(st.just(0.0), st.floats(1e-308, 1e308)),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
)
def test_every_setting_keeps_a_likeliest_token_and_sums_to_one(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = np.asarray(logits, dtype=np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities = distribution(scores, params, ())
    assert probabilities.sum() == pytest.approx(1)
    # Logits that are equal after the division by a high temperature are ties.
    assert max(scores[probabilities > 0].tolist()) >= max(scores.tolist()) - 1e-12 * max(temperature, 1)
    assert probabilities[Sampler(params, ()).sample(scores)] > 0


def test_among_equal_tokens_top_p_keeps_the_lower_ids() -> None:
    probabilities = distribution(np.zeros(8, dtype=np.float32), SamplingParams(temperature=1.0, top_p=0.5), ())
    assert np.flatnonzero(probabilities).tolist() == [0, 1, 2, 3]


def test_greedy_takes_the_lowest_of_the_likeliest_tokens_whatever_the_filters() -> None:
    logits = np.asarray([0, 3, 1, 3], dtype=np.float32)
    params = SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.5)
    assert Sampler(params, ()).sample(logits) == 1
    assert distribution(logits, params, ()).tolist() == [0, 1, 0, 0]


def test_greedy_is_penalized_for_the_prompt_and_for_what_it_drew() -> None:
    logits = np.asarray([3.0, 2.5, 2.0, -1.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0, 0])
    # After a penalty: 1.5, 1.25, 1.0; a token is penalized once, however often it was seen.
    assert [sampler.sample(logits) for _ in range(4)] == [1, 2, 0, 0]


def test_negative_logits_of_seen_tokens_go_down() -> None:
    got = distribution(
        np.asarray([-1, -1], dtype=np.float32), SamplingParams(temperature=1.0, repetition_penalty=2.0), [1]
    )
    np.testing.assert_allclose(got, np.exp([-1, -2]) / np.exp([-1, -2]).sum())


def test_penalties_count_what_was_decoded_and_not_the_prompt() -> None:
    logits = np.asarray([3.0, 2.5, 2.0], dtype=np.float32)
    once = Sampler(SamplingParams(presence_penalty=0.75), [0, 0])
    # After one: 2.25, 1.75, 1.25; however often it came.
    assert [once.sample(logits) for _ in range(5)] == [0, 1, 0, 0, 0]
    each = Sampler(SamplingParams(frequency_penalty=0.4), [0, 0])
    # 3.0, 2.6, 2.2, 1.8 against 2.5, 2.1 and 2.0.
    assert [each.sample(logits) for _ in range(6)] == [0, 0, 1, 0, 1, 2]
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=-0.25)
    expected = np.exp(logits.astype(np.float64) - [0.5 - 0.25 * 3, 0, 0.5 - 0.25])
    np.testing.assert_allclose(distribution(logits, params, (), {0: 3, 2: 1}), expected / expected.sum())


def test_what_is_proposed_counts_what_was_proposed_before() -> None:
    logits = np.asarray([3.0, 2.5, 2.0], dtype=np.float32)
    for params in (SamplingParams(presence_penalty=1.2), SamplingParams(frequency_penalty=1.2)):
        sampler = Sampler(params, ())
        assert [sampler.propose(logits, ahead).token_id for ahead in ([], [0], [0, 1])] == [0, 1, 2]
        assert sampler.sample(logits) == 0
        assert sampler.propose(logits, [1]).token_id == 2


def test_biases_are_added_before_all_else() -> None:
    logits = np.asarray([3.0, 2.5, 2.0], dtype=np.float32)
    assert Sampler(SamplingParams(logit_bias={2: 1.5, 0: -0.1}), ()).sample(logits) == 2
    got = distribution(logits, SamplingParams(temperature=1.0, logit_bias={0: -100, 1: 1}, repetition_penalty=2), [1])
    np.testing.assert_allclose(got[1:], np.exp([1.75, 2]) / np.exp([1.75, 2]).sum())
    assert got[0] < 1e-40
    with pytest.raises(ConfigError, match="logit_bias: expected ids from 0 to 2, got 3"):
        Sampler(SamplingParams(logit_bias={3: 1}), ()).sample(logits)


def test_sampling_counts_drawn_tokens_as_seen() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, repetition_penalty=1e6, seed=0), ())
    logits = np.full(50, 40, dtype=np.float32)
    drawn = [sampler.sample(logits) for _ in range(50)]
    assert sorted(drawn) == list(range(50))


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({"temperature": 0.7, "top_p": 0.95}, [3754, 4912, 3908, 1966, 1252, 4759, 170, 4657]),
        ({"temperature": 1.0, "top_k": 40, "min_p": 0.02}, [3333, 4912, 3908, 1966, 1252, 4759, 152, 4657]),
        ({"temperature": 1.3}, [3252, 4912, 3908, 1242, 1475, 4523, 41, 4657]),
    ],
)
def test_a_seed_draws_what_it_always_drew(options: dict[str, Any], drawn: list[int]) -> None:
    sampler = Sampler(SamplingParams(seed=7, **options), [])
    assert [sampler.sample(_logits(number, 5003)) for number in range(8)] == drawn


def test_a_seed_repeats_the_draws_and_another_does_not() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), ())
        return [sampler.sample(np.zeros(1000, dtype=np.float32)) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.6, top_k=6, repetition_penalty=1.4, seed=2),
        SamplingParams(temperature=1.5, top_p=0.8, min_p=0.05, seed=3),
    ],
    ids=str,
)
def test_draws_are_as_frequent_as_their_probabilities(params: SamplingParams) -> None:
    num_draws, logits = 20_000, _logits(4, 12, scale=1.0)
    # With a penalty all tokens count as seen from the start, so that the distribution stays what it is.
    expected = distribution(logits, params, range(12)) * num_draws
    sampler = Sampler(params, range(12))
    counts = np.bincount([sampler.sample(logits) for _ in range(num_draws)], minlength=12)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = (np.square(counts - expected)[possible] / expected[possible]).sum()
    freedom = np.count_nonzero(possible) - 1
    # Mean and standard deviation of chi-square; the seeds are fixed, so this either holds or does not.
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([0, np.nan, 1, np.nan], "2 NaN and 0 infinite"),
        ([0, np.inf, 1, np.nan], "1 NaN and 1 infinite"),
        ([-np.inf, -np.inf], "minus infinity throughout"),
    ],
)
def test_logits_without_a_softmax_are_an_error(temperature: float, values: list[float], got: str) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=1), ())
    with pytest.raises(CoreInferError, match=f"^logits of {len(values)} tokens: expected finite numbers, got {got}$"):
        sampler.sample(np.asarray(values, dtype=np.float32))


def test_a_masked_token_is_never_drawn() -> None:
    logits = np.asarray([-np.inf, 0, -np.inf], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=100.0, repetition_penalty=3.0, seed=0), [0, 1, 2])
    assert {sampler.sample(logits) for _ in range(50)} == {1}


@pytest.mark.parametrize("shape", [(1, 5), (0,), ()])
def test_logits_must_be_a_vector(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^logits: expected the shape \(vocab,\), got \("):
        Sampler(SamplingParams(), ()).sample(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("token_id", [-1, 5])
def test_seen_tokens_must_be_in_the_vocabulary(token_id: int) -> None:
    with pytest.raises(ConfigError, match=f"^seen tokens: expected ids from 0 to 4, got {token_id}$"):
        Sampler(SamplingParams(repetition_penalty=1.1), [2, token_id]).sample(np.zeros(5, dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("temperature", "min_p"), (-0.1, float("nan"), float("inf"), True, "1", None)),
        *itertools.product(("top_p",), (0, 0.0, 1.1, float("nan"), True, None)),
        *itertools.product(("repetition_penalty",), (0, -1.0, float("inf"), True, None)),
        *itertools.product(("presence_penalty", "frequency_penalty"), (-2.1, 3, float("nan"), None)),
        *itertools.product(("top_k", "seed"), (-1, 1.0, True, "3")),
        ("min_p", 1.5),
        ("top_k", None),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name}: expected ")
    assert str(error.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("bias", [None, [1], {"1": 1}, {-1: 1}, {1: 101}, {1: "1"}, {1: float("nan")}])
def test_a_wrong_bias_is_named(bias: Any) -> None:
    with pytest.raises(ConfigError, match=r"^logit_bias"):
        SamplingParams(logit_bias=bias)


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^6 problems: ") as error:
        SamplingParams(temperature=-1, top_k=-1, top_p=2, min_p=2, repetition_penalty=0, seed=-1)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        assert f") {name}: expected" in str(error.value)


def test_whole_numbers_serve_as_numbers() -> None:
    assert SamplingParams(temperature=1, top_p=1, min_p=0, repetition_penalty=1) == SamplingParams(temperature=1.0)
