"""A team whose places are all in this process: how work is dealt, added up, and done again."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from coreinfer.bundles import read_manifest
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.team.adding import add_arrays, add_up, pass_on
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.team.dealing import Stepwise, deal, home, homes_of, in_turn, overlapped
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Pending, Worker

from .test_carrying import load

T = TypeVar("T")
MANIFEST = "manifest.json"
SEARCH: dict[str, Any] = {"effort": "quick", "keep": None, "max_kl": 0.02}


class Forgetful(Alone):
    """Loses at random all that a worker has noted, as if another process had taken its place."""

    def __init__(self, loaded: LoadedModel, size: int, every: int) -> None:
        super().__init__(loaded, size)
        self._chances, self._every = random.Random(3), every
        self.num_replaced = 0

    def call(self, place: int, stage: str, task: Callable[..., T], *arguments: object) -> Pending[T]:
        return super().call(place, stage, partial(self._run, task), *arguments)

    def _run(self, task: Callable[..., T], worker: Worker, *arguments: object) -> T:
        if worker.notes and self._chances.randrange(self._every) == 0:
            worker.notes.clear()
            self.num_replaced += 1
        return task(worker, *arguments)


def files_of(bundle: Path) -> dict[str, bytes]:
    """All files but the manifest, which says by how many workers they were made."""
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


@pytest.fixture
def compile_by(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A function (make team, family, name, **options) that compiles a tiny model by a team of this process."""

    def run(team: Callable[[LoadedModel], Alone], family: str = "llama", name: str = "bundle", **options: Any) -> Path:
        monkeypatch.setattr("coreinfer.compiler.pipeline.Alone", team)
        compile_model(replace(tiny_inputs(family), **{"threads": 1, **options, "output": tmp_path / name}), Progress())
        return tmp_path / name

    return run


@pytest.mark.parametrize("num_places", [1, 2, 3, 7])
def test_places_get_about_as_many_tokens_and_whole_clusters_where_they_can(num_places: int) -> None:
    generator = np.random.default_rng(0)
    lengths, labels = generator.integers(5, 60, 200).tolist(), generator.integers(0, 6, 200)
    team = Alone(load("llama"), num_places)
    for given in (None, labels):
        dealt = deal(lengths, team, given)
        assert sorted(np.concatenate([*dealt.values()]).tolist()) == list(range(200))
        shares = [sum(lengths[index] for index in ids) for ids in dealt.values()]
        assert max(shares) - min(shares) <= 2 * max(lengths)
        assert all((np.diff(ids) > 0).all() for ids in dealt.values())
    parts = sum(len(set(labels[ids].tolist())) for ids in deal(lengths, team, labels).values())
    assert parts <= 6 + num_places - 1


def test_fewer_documents_than_places_leave_places_free() -> None:
    dealt = deal([10, 10], Alone(load("llama"), 5))
    assert sorted(index for ids in dealt.values() for index in ids.tolist()) == [0, 1]
    assert all(len(ids) for ids in dealt.values())


def test_sums_are_added_as_a_tree_in_the_order_of_places() -> None:
    team, order = Alone(load("llama"), 5), list[tuple[str, str]]()

    def add(_worker: Worker, first: str, second: str) -> str:
        order.append((first, second))
        return first + second

    parts = {place: team.call(place, "test", lambda _, name=name: name) for place, name in enumerate("abcde")}
    assert add_up(team, "test", add, parts).result() == "abcde"
    assert sorted(order) == [("a", "b"), ("ab", "cd"), ("abcd", "e"), ("c", "d")]


def test_values_are_passed_on_from_place_to_place() -> None:
    team, asked = Alone(load("llama"), 6), list[tuple[int, object]]()
    call = team.call

    def watch(place: int, stage: str, task: Callable[..., Any], *arguments: object) -> Pending[Any]:
        pending = call(place, stage, task, *arguments)
        asked.append((place, arguments[0]))
        there[place] = pending
        return pending

    there: dict[int, Pending[Any]] = {}
    value = call(0, "test", lambda _worker: "value")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "call", watch)
        found = pass_on(team, "test", value, [0, 1, 2, 4, 5])
    assert [place for place, _ in asked] == [0, 1, 2, 4, 5]
    # From the one before in the tree: nobody sends it more than twice.
    assert [source for _, source in asked] == [value, there[0], there[0], there[1], there[1]]
    assert {place: pending.result() for place, pending in found.items()} == dict.fromkeys([0, 1, 2, 4, 5], "value")
    assert pass_on(team, "test", value, [3]) == {3: value}


def test_clusters_are_at_home_where_their_text_is_and_no_place_has_more_than_its_share() -> None:
    team = Alone(load("llama"), 2)
    homes = homes_of([{0: 90, 1: 10}, {0: 5}, {0: 9}, {1: 30}], team)
    assert homes == {0: 0, 3: 1, 1: 0, 2: 1}
    # Neighbours have text at different places.
    assert [*homes] == [0, 3, 1, 2]
    assert [*homes_of([{0: 3}] * 3, Alone(load("llama"))).items()] == [(0, 0), (1, 0), (2, 0)]


def test_arrays_that_one_place_lacks_are_taken_from_the_other() -> None:
    worker = Worker(place=0, loaded=load("llama"))
    first, second = {"a": np.ones(2), "b": np.ones(1)}, {"b": np.ones(1), "c": np.zeros(1)}
    found = add_arrays(worker, first, second)
    assert {name: values.tolist() for name, values in found.items()} == {"a": [1, 1], "b": [2], "c": [0]}
    assert first["b"].tolist() == [1]


def test_items_come_in_turn_and_some_are_asked_for_in_advance() -> None:
    class Ahead(Alone):
        ahead = 2

    asked: list[int] = []

    def ask(item: int) -> int:
        asked.append(item)
        return item * item

    seen = [(item, found, len(asked)) for item, found in in_turn(Ahead(load("llama")), range(5), ask)]
    assert seen == [(0, 0, 3), (1, 1, 4), (2, 4, 5), (3, 9, 5), (4, 16, 5)]
    assert [home(Alone(load("llama"), 3), number) for number in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("ahead", [0, 4])
def test_an_item_begins_before_the_one_before_it_goes_on(ahead: int) -> None:
    taken: list[str] = []

    def work(item: int) -> Stepwise[int]:
        for step in "abc"[: 1 if item == 2 else 3]:
            taken.append(f"{item}{step}")
            yield
        return item * item

    team = Alone(load("llama"))
    team.ahead = ahead
    found = []
    for item, square in overlapped(team, range(4), work):
        found.append((item, square))
        taken.append("|")
    assert found == [(0, 0), (1, 1), (2, 4), (3, 9)]
    if ahead:
        # Of item 2 nothing is left to do, but it comes in its turn.
        assert " ".join(taken) == "0a 1a 0b 2a 1b 0c 3a 1c | 3b | | 3c |"
    else:
        assert " ".join(taken) == "0a 0b 0c | 1a 1b 1c | 2a | 3a 3b 3c |"


def test_steps_that_are_done_elsewhere_are_reported_at_the_end() -> None:
    import pickle

    seen: list[int] = []
    steps = Steps(lambda steps=1: seen.append(steps))
    steps(2)
    pickle.loads(pickle.dumps(steps))(5)
    steps.reach(7)
    steps.reach(7)
    assert seen == [2, 5]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("opt", {"controls": False, "quantize": "int4"}),
        ("llama", {"repair_rounding": True, "quantize": "int8", "controls": False}),
        ("llama", SEARCH),
        ("mixtral", {"budgets": "energy"}),
        ("mixtral", {"budgets": "energy", "experts": "narrow", "controls": False}),
    ],
    ids=["carried", "biases", "rounded", "sums kept", "experts", "narrow experts"],
)
def test_workers_that_are_replaced_change_no_byte(
    family: str, options: dict[str, Any], compile_by: Callable[..., Path]
) -> None:
    teams: list[Forgetful] = []

    def forgetful(loaded: LoadedModel) -> Alone:
        teams.append(Forgetful(loaded, 2, every=2))
        return teams[0]

    expected = compile_by(partial(Alone, size=2), family, "expected", **options)
    found = compile_by(forgetful, family, "found", **options)
    assert teams[0].num_replaced >= 5
    assert files_of(found) == files_of(expected)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("opt", {}), ("llama", SEARCH)])
def test_other_numbers_of_places_differ_by_rounding_only(
    family: str, options: dict[str, Any], compile_by: Callable[..., Path]
) -> None:
    bundles = [compile_by(partial(Alone, size=size), family, f"{size} places", **options) for size in (1, 2, 3)]
    alone, *others = (read_manifest(bundle) for bundle in bundles)
    for other in others:
        assert alone.quality is not None
        assert other.quality is not None
        assert other.quality.clusters.kl == pytest.approx(alone.quality.clusters.kl, rel=0.02)
        assert other.plan.layer_budgets == alone.plan.layer_budgets
    # What does not go by sums over all text is the same to the byte.
    for name in ("router/encoder/table.safetensors", "router/index.faiss", "tokenizer/tokenizer.json"):
        assert len({(bundle / name).read_bytes() for bundle in bundles}) == 1
