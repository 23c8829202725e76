import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.statistics import (
    SELECTIONS,
    Selection,
    document_statistic,
    mix_scores,
    scores_from_statistic,
    select_neurons,
    sentence_core,
    token_core_counts,
    top_neurons,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

Array = npt.NDArray[np.float32]
NUM_TOKENS, FFN_DIM = 17, 90


def naive_token_core(token: Array, alpha: Fraction) -> set[int]:
    """The neurons whose activation is among the top `alpha` share of the token's positive activations."""
    positive = [neuron for neuron, activation in enumerate(token) if activation > 0]
    ranked = sorted(positive, key=lambda neuron: (-token[neuron], neuron))
    return set(ranked[: math.ceil(alpha * len(positive))])


def naive_counts(activations: Array, alpha: Fraction) -> list[int]:
    """How often each neuron is token-wise core over the sentence's tokens."""
    cores = [naive_token_core(token, alpha) for token in activations]
    return [sum(neuron in core for core in cores) for neuron in range(activations.shape[1])]


def naive_sentence_core(counts: list[int], beta: Fraction) -> set[int]:
    """The `beta` x ffn_dim neurons with the highest counts, ties by lower neuron id."""
    ranked = sorted(range(len(counts)), key=lambda neuron: (-counts[neuron], neuron))
    return set(ranked[: max(1, round(beta * len(counts)))])


def gaussian(rng: np.random.Generator) -> Array:
    return rng.standard_normal((NUM_TOKENS, FFN_DIM), dtype=np.float32)


def tied(rng: np.random.Generator) -> Array:
    return np.round(gaussian(rng)).astype(np.float32)


def relu_like(rng: np.random.Generator) -> Array:
    return np.asarray(np.maximum(gaussian(rng) - 1.5, 0), dtype=np.float32)


def nearly_silent(rng: np.random.Generator) -> Array:
    """Tokens without a positive activation, with one, and all positive."""
    activations = -np.abs(gaussian(rng))
    activations[1, 7] = 1.0
    activations[2] = 2.0
    activations[3] = 0.0
    return activations


def one_token(rng: np.random.Generator) -> Array:
    return gaussian(rng)[:1]


KINDS: list[Callable[[np.random.Generator], Array]] = [gaussian, tied, relu_like, nearly_silent, one_token]
SHARES = ["0.1", "0.2", "0.3", "0.4", "0.7", "1"]


@pytest.fixture(params=KINDS, ids=[kind.__name__ for kind in KINDS])
def activations(request: pytest.FixtureRequest) -> Array:
    made: Array = request.param(np.random.default_rng(5))
    return made


@pytest.mark.parametrize("alpha", SHARES)
def test_token_core_counts_are_those_of_a_loop_over_tokens(activations: Array, alpha: str) -> None:
    got = token_core_counts(activations, alpha=float(alpha))
    assert got.dtype == np.float32
    assert got.tolist() == naive_counts(activations, Fraction(alpha))


few_values = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 5), st.integers(1, 30)), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])
)


@settings(max_examples=150, deadline=None)
@given(few_values, st.integers(1, 100), st.integers(1, 100))
def test_core_neurons_with_many_ties(activations: Array, alpha_percent: int, beta_percent: int) -> None:
    alpha, beta = Fraction(alpha_percent, 100), Fraction(beta_percent, 100)
    counts = token_core_counts(activations, alpha=float(alpha))
    expected = naive_counts(activations, alpha)
    assert counts.tolist() == expected
    if (beta * len(expected)) % 1 != Fraction(1, 2):
        core = np.flatnonzero(sentence_core(counts, beta=float(beta)))
        assert set(core.tolist()) == naive_sentence_core(expected, beta)


@pytest.mark.parametrize(("alpha", "num_positive", "expected"), [(0.07, 100, 7), (0.14, 50, 7), (0.28, 25, 7)])
def test_a_whole_share_is_not_rounded_up_by_float_error(alpha: float, num_positive: int, expected: int) -> None:
    assert math.ceil(alpha * num_positive) == expected + 1
    token = np.arange(1, num_positive + 1, dtype=np.float32)[None]
    assert token_core_counts(token, alpha=alpha).sum() == expected


def test_a_token_without_positive_activations_has_no_core() -> None:
    assert token_core_counts(np.array([[-1.0, 0.0, -2.0]], np.float32), alpha=1.0).tolist() == [0, 0, 0]
    assert token_core_counts(np.zeros((0, 3), np.float32), alpha=0.4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("beta", SHARES)
def test_sentence_core_marks_the_highest_counts(activations: Array, beta: str) -> None:
    counts = token_core_counts(activations, alpha=0.4)
    marks = sentence_core(counts, beta=float(beta))
    expected = naive_sentence_core(naive_counts(activations, Fraction("0.4")), Fraction(beta))
    assert marks.dtype == np.float32
    assert set(np.unique(marks).tolist()) <= {0.0, 1.0}
    assert set(np.flatnonzero(marks).tolist()) == expected
    assert len(expected) == max(1, round(Fraction(beta) * FFN_DIM))


def test_sentence_core_keeps_at_least_one_neuron() -> None:
    assert sentence_core(np.array([0, 3, 1], np.float32), beta=0.01).tolist() == [0, 1, 0]


@pytest.mark.parametrize("beta", [0.2, 0.4])
def test_a_coreinfer_document_is_its_sentence_core_or_its_counts(activations: Array, beta: float) -> None:
    counts = naive_counts(activations, Fraction("0.4"))
    core = naive_sentence_core(counts, Fraction(str(beta)))
    marked = document_statistic("coreinfer", activations, alpha=0.4, beta=beta)
    assert set(np.flatnonzero(marked).tolist()) == core
    counted = document_statistic("coreinfer", activations, alpha=0.4, beta=beta, sentence=False)
    assert counted.tolist() == counts


def test_output_aware_statistic_is_the_sum_of_squares(activations: Array) -> None:
    expected = [sum(float(value) ** 2 for value in column) for column in activations.T]
    got = document_statistic("output-aware", activations, alpha=0.4, beta=0.4)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_griffin_statistic_is_the_squared_norm_of_scaled_columns(activations: Array) -> None:
    """GRIFFIN, section 4: scale each token's activations to norm 1, then take each neuron's norm over tokens."""
    exact = activations.astype(np.float64)
    norms = np.array([math.sqrt(sum(value**2 for value in token)) for token in exact])
    scaled = exact / np.where(norms > 0, norms, 1)[:, None]
    got = document_statistic("griffin", activations, alpha=0.4, beta=0.4)
    np.testing.assert_allclose(np.sqrt(got), np.linalg.norm(scaled, axis=0), rtol=1e-5)
    assert got.sum() == pytest.approx(np.count_nonzero(norms), rel=1e-5)


def test_griffin_does_not_care_how_loud_a_token_is(activations: Array) -> None:
    loudness = np.linspace(0.1, 50, len(activations), dtype=np.float32)[:, None]
    quiet = document_statistic("griffin", activations, alpha=0.4, beta=0.4)
    np.testing.assert_allclose(
        document_statistic("griffin", activations * loudness, alpha=0.4, beta=0.4), quiet, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_statistic_leaves_the_activations_as_they_are(selection: Selection, activations: Array) -> None:
    before = activations.copy()
    document_statistic(selection, activations, alpha=0.4, beta=0.4)
    assert np.array_equal(activations, before)


@pytest.mark.parametrize(
    ("selection", "options"), [("output-aware", {}), ("griffin", {}), ("coreinfer", {"sentence": False})]
)
@pytest.mark.parametrize("cut", [0, 1, 9, NUM_TOKENS])
def test_statistics_of_the_parts_add_up(selection: Selection, options: dict[str, Any], cut: int) -> None:
    activations = tied(np.random.default_rng(2))

    def statistic(part: Array) -> Array:
        return document_statistic(selection, part, alpha=0.4, beta=0.4, **options)

    whole = statistic(activations)
    np.testing.assert_allclose(statistic(activations[:cut]) + statistic(activations[cut:]), whole, rtol=1e-5)


def rms(values: Array) -> Array:
    return np.asarray(np.sqrt(np.mean(np.square(values.astype(np.float64)), axis=-1)))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_scores_have_a_root_mean_square_of_one_in_every_layer(selection: Selection) -> None:
    rng = np.random.default_rng(3)
    statistic = (rng.random((4, FFN_DIM)) * np.array([[1e-6], [1], [1e3], [1e6]])).astype(np.float32)
    norms = rng.random((4, FFN_DIM), dtype=np.float32) + np.float32(0.5)
    scores = scores_from_statistic(selection, statistic, 250, norms)
    assert (scores.dtype, scores.shape) == (np.dtype("float32"), statistic.shape)
    np.testing.assert_allclose(rms(scores), 1, rtol=1e-5)
    np.testing.assert_allclose(scores_from_statistic(selection, statistic[2], 250, norms[2]), scores[2], rtol=1e-6)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_scores_follow_their_formula_up_to_scale(selection: Selection) -> None:
    statistic = np.array([4.0, 0.0, 9.0, 1.0], np.float32)
    norms = np.array([0.5, 3.0, 1.0, 4.0], np.float32)
    raw: dict[str, list[float]] = {
        "coreinfer": [4, 0, 9, 1],
        "griffin": [2, 0, 3, 1],
        "output-aware": [2 * 0.5, 0, 3 * 1.0, 1 * 4.0],
    }
    expected = np.array(raw[selection]) / math.sqrt(sum(value**2 for value in raw[selection]) / 4)
    np.testing.assert_allclose(scores_from_statistic(selection, statistic, 10, norms), expected, rtol=1e-6)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_scores_of_nothing_are_zeros(selection: Selection) -> None:
    scores = scores_from_statistic(selection, np.zeros((2, 5), np.float32), 0, np.ones((2, 5), np.float32))
    assert scores.tolist() == [[0.0] * 5] * 2


def random_scores(seed: int) -> Array:
    return np.abs(np.random.default_rng(seed).standard_normal((2, 6), dtype=np.float32))


@pytest.mark.parametrize(
    ("num_prompt_tokens", "half_tokens", "weight"), [(0, 100, 0.0), (100, 100, 0.5), (300, 100, 0.75), (7, 0, 1.0)]
)
def test_mixed_scores_weigh_the_prompt_by_its_length(num_prompt_tokens: int, half_tokens: int, weight: float) -> None:
    prompt, cluster = random_scores(0), random_scores(1)
    mixed = mix_scores(prompt, cluster, num_prompt_tokens=num_prompt_tokens, half_tokens=half_tokens)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, weight * prompt + (1 - weight) * cluster, rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "budget", "expected"),
    [
        ([1, 3, 2, 3, 3], 2, [1, 3]),
        ([1, 3, 2, 3, 3], 4, [1, 2, 3, 4]),
        ([5, 5, 5, 5], 3, [0, 1, 2]),
        ([0, -1, -1, 4], 3, [0, 1, 3]),
        ([2, 1], 2, [0, 1]),
    ],
)
def test_top_neurons_ascend_and_ties_go_to_the_lower_id(scores: list[int], budget: int, expected: list[int]) -> None:
    got = top_neurons(np.array(scores, np.float32), budget)
    assert got.dtype == np.int32
    assert got.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 7.0]), min_size=1, max_size=60), st.data())
def test_top_neurons_are_those_of_a_sort(values: list[float], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda neuron: (-values[neuron], neuron))[:budget])
    assert top_neurons(np.array(values, np.float32), budget).tolist() == expected


@pytest.mark.parametrize("budget", [0, -1, 6, 1000])
def test_a_budget_out_of_range_is_refused(budget: int) -> None:
    with pytest.raises(ConfigError, match=f"a layer budget of {budget} neurons: expected 1 to 5"):
        top_neurons(np.ones(5, np.float32), budget)


def test_select_neurons_gives_each_layer_its_budget() -> None:
    scores = np.array([[3, 1, 2, 0], [0, 5, 5, 5]], np.float32)
    assert [ids.tolist() for ids in select_neurons(scores, [3, 2])] == [[0, 1, 2], [1, 2]]
    with pytest.raises(ConfigError, match="a layer budget of 5"):
        select_neurons(scores, [1, 5])
    with pytest.raises(ValueError, match="zip"):
        select_neurons(scores, [1])
