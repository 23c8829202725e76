"""Draft lengths on machines and texts that are made up."""

import random

import pytest
from coreinfer.runtime.decoding.drafting import MAX_LENGTH, DraftCosts, DraftLength, expected_tokens


def decode(
    lengths: DraftLength,
    *,
    num_tokens: int,
    acceptance: float,
    draft_seconds: float = 0.5,
    row_seconds: float = 0.05,
    plain_seconds: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Run a generation; returns the draft length of every round."""
    generator, chosen = random.Random(seed), []
    while num_tokens > 0:
        length = lengths.next(num_tokens - 1)
        chosen.append(length)
        assert 0 <= length <= max(num_tokens - 1, 0)
        if length == 0:
            lengths.note_plain(plain_seconds)
            num_tokens -= 1
            continue
        lengths.note_round(length, length * draft_seconds, plain_seconds + row_seconds * length)
        num_accepted = next((i for i in range(length) if generator.random() >= acceptance), length)
        for number in range(min(num_accepted + 1, length)):
            lengths.note_choice(accepted=number < num_accepted)
        num_tokens -= num_accepted + 1
    return chosen


def best_length(acceptance: float, draft_seconds: float, row_seconds: float) -> int:
    def tokens_per_second(length: int) -> float:
        return expected_tokens(acceptance, length) / (length * draft_seconds + 1 + row_seconds * length)

    return max(range(1, MAX_LENGTH + 1), key=tokens_per_second)


@pytest.mark.parametrize(("acceptance", "draft_seconds"), [(0.9, 0.1), (0.8, 0.3), (0.97, 0.2), (1.0, 0.05)])
def test_lengths_settle_at_the_best(acceptance: float, draft_seconds: float) -> None:
    lengths = DraftLength(DraftCosts())
    chosen = decode(lengths, num_tokens=3000, acceptance=acceptance, draft_seconds=draft_seconds)
    best = best_length(acceptance, draft_seconds, 0.05)
    typical = sorted(chosen[20:-1])[len(chosen[20:-1]) // 2]
    assert abs(typical - best) <= max(1, best // 3)
    report = lengths.report()
    assert report.acceptance == pytest.approx(acceptance, abs=0.03)
    assert report.num_rounds == sum(length > 0 for length in chosen)
    assert report.num_drafted == sum(chosen)
    assert report.num_plain == chosen.count(0)
    assert not report.turned_off


@pytest.mark.parametrize(("acceptance", "draft_seconds"), [(0.1, 0.5), (0.7, 0.95), (0.0, 0.1)])
def test_drafting_turns_itself_off_where_it_does_not_pay(acceptance: float, draft_seconds: float) -> None:
    lengths = DraftLength(DraftCosts())
    chosen = decode(lengths, num_tokens=3000, acceptance=acceptance, draft_seconds=draft_seconds)
    assert lengths.report().turned_off
    assert chosen.count(0) > 0.9 * 3000
    # It is tried again now and then, ever more seldom.
    rounds = [place for place, length in enumerate(chosen) if length and place > 10]
    assert 4 <= len(rounds) <= 40


def test_drafting_comes_back_when_it_pays_again() -> None:
    lengths = DraftLength(DraftCosts())
    decode(lengths, num_tokens=400, acceptance=0.0, draft_seconds=0.2)
    chosen = decode(lengths, num_tokens=2000, acceptance=0.98, draft_seconds=0.2)
    assert chosen[-50:].count(0) == 0


def test_what_was_learnt_serves_the_next_generation() -> None:
    costs = DraftCosts()
    assert decode(DraftLength(costs), num_tokens=300, acceptance=0.1, draft_seconds=0.8)[:4] == [0, 0, 3, 7]
    second = DraftLength(costs)
    chosen = decode(second, num_tokens=60, acceptance=0.1, draft_seconds=0.8)
    assert chosen.count(0) >= 57
    assert second.report().turned_off
    assert second.report().num_plain == chosen.count(0)


def test_without_a_clock_the_lengths_follow_from_the_tokens() -> None:
    quick = decode(DraftLength(), num_tokens=500, acceptance=0.9, draft_seconds=0.1)
    slow = decode(DraftLength(), num_tokens=500, acceptance=0.9, draft_seconds=9.0, plain_seconds=3.0)
    assert quick == slow
    assert max(quick) > 1
    assert decode(DraftLength(), num_tokens=500, acceptance=0.0).count(0) > 400


def test_expected_tokens() -> None:
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)
