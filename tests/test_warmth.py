"""Which replica gets a request: packs stay warm, nobody starves, conversations stay where they are."""

import heapq
import random

import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.server.replicas.messages import Hint
from coreinfer.server.replicas.replica_config import ReplicaConfig
from coreinfer.server.replicas.warmth import Place, WarmPacks, Warmth, share_of

AT_ONCE, LIMIT = 8, 24


def places(**loads: int) -> list[Place]:
    return [Place(replica=name, load=load, num_at_once=AT_ONCE, limit=LIMIT) for name, load in loads.items()]


def chosen(warmth: Warmth, hint: Hint, **loads: int) -> str:
    """What Ray Serve makes of the ranks: the least loaded of the first rank with a place."""
    for rank in warmth.ranked(places(**loads), hint):
        if free := [name for name in rank if loads[name] < LIMIT]:
            name = min(free, key=lambda name: loads[name])
            warmth.note(name, hint, list(loads))
            return name
    raise AssertionError("all are full")


def test_clusters_are_shared_out_and_stay() -> None:
    warmth = Warmth(4)
    homes = {cluster: chosen(warmth, Hint(cluster=cluster), a=0, b=0) for cluster in range(4)}
    assert sorted(homes.values()) == ["a", "a", "b", "b"]
    for _ in range(3):
        assert {cluster: chosen(warmth, Hint(cluster=cluster), a=0, b=0) for cluster in range(4)} == homes


def test_a_burst_finds_its_homes_before_a_request_was_sent() -> None:
    warmth = Warmth(2)
    first = [warmth.ranked(places(a=0, b=0), Hint(cluster=cluster))[0] for cluster in (0, 1, 0, 1)]
    assert first[:2] == first[2:]
    assert sorted(first[:2]) == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("home", "other", "goes_home"),
    [
        (0, 0, True),
        (4, 0, True),
        (5, 0, False),  # more by half of what it answers at once
        (8, 7, False),  # it would wait there, and not elsewhere
        (12, 8, True),
        (13, 8, False),
        (LIMIT, LIMIT - 1, False),
    ],
)
def test_an_overloaded_home_is_passed_over(home: int, other: int, goes_home: bool) -> None:
    warmth = Warmth(2)
    assert [chosen(warmth, Hint(cluster=cluster), a=0, b=0) for cluster in (0, 1)] == ["a", "b"]
    assert chosen(warmth, Hint(cluster=0), a=home, b=other) == ("a" if goes_home else "b")
    # A rush moves no home.
    assert chosen(warmth, Hint(cluster=0), a=0, b=0) == "a"


def test_a_lost_replica_gives_its_clusters_to_others() -> None:
    warmth = Warmth(2)
    chosen(warmth, Hint(cluster=0), a=0, b=0)
    assert chosen(warmth, Hint(cluster=0), b=3) == "b"
    assert chosen(warmth, Hint(cluster=1), b=3, c=3) == "c"


def test_more_replicas_than_clusters_all_become_homes() -> None:
    warmth = Warmth(2)
    loads = dict.fromkeys("abcd", 0)
    found = set()
    for _ in range(40):
        name = chosen(warmth, Hint(cluster=0), **loads)
        loads[name] += 1
        found.add(name)
        if len(found) == 3:
            break
    # One is kept for the cluster that has not come yet.
    assert chosen(warmth, Hint(cluster=1), **dict.fromkeys("abcd", 0)) not in found


def test_a_later_turn_goes_where_its_conversation_is() -> None:
    warmth = Warmth(2)
    assert [chosen(warmth, Hint(cluster=cluster), a=0, b=0) for cluster in (0, 1)] == ["a", "b"]
    assert chosen(warmth, Hint(cluster=0, conversation="x"), a=20, b=9) == "b"
    assert chosen(warmth, Hint(cluster=0, conversation="x", continues=True), a=0, b=0) == "b"
    assert chosen(warmth, Hint(cluster=0, conversation="x", continues=True), a=0, b=20) == "a"


def test_dense_requests_go_by_load() -> None:
    warmth = Warmth(2)
    assert [chosen(warmth, Hint(), a=load, b=3) for load in (2, 4)] == ["a", "b"]


def test_shares_and_what_is_forgotten() -> None:
    assert [share_of(4, number) for number in (0, 1, 2, 3, 8)] == [4, 4, 2, 2, 1]
    packs = WarmPacks()
    assert [packs.note("a", cluster, at_most=2) for cluster in (0, 1, 0, 2, 1)] == [False, False, True, False, False]
    assert (packs.has("a", 2), packs.has("a", 0), packs.num_warm("a")) == (True, False, 2)
    packs.keep([])
    assert packs.num_warm("a") == 0


@pytest.mark.parametrize("num_clients", [4, 12, 32])
def test_packs_are_warm_more_often_than_by_load(num_clients: int) -> None:
    assert warm_share(Warmth(4), num_clients) > 0.8
    assert 0.4 < warm_share(None, num_clients) < 0.6


def warm_share(warmth: Warmth | None, num_clients: int, num_requests: int = 2000) -> float:
    """Clients that ask again when they have their answer; requests of a replica share its time."""
    draw, used = random.Random(3), WarmPacks()
    loads, ends = {"a": 0, "b": 0}, [(0.0, "")] * num_clients
    num_warm = 0
    for _ in range(num_requests):
        now, ended = heapq.heappop(ends)
        if ended:
            loads[ended] -= 1
        hint = Hint(cluster=draw.randrange(4))
        name = chosen(warmth, hint, **loads) if warmth else min(loads, key=lambda name: (loads[name], draw.random()))
        assert hint.cluster is not None
        num_warm += used.note(name, hint.cluster, at_most=2)
        loads[name] += 1
        heapq.heappush(ends, (now + draw.expovariate(1.0) * max(1.0, loads[name] / AT_ONCE), name))
    return num_warm / num_requests


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="they are for engines on Ray; give --ray ADDRESS, or --ray local"):
        ReplicaConfig(replicas=2)
    with pytest.raises(ConfigError, match="--max-replicas: expected at least --replicas 3, got 2"):
        ReplicaConfig(ray="local", replicas=3, max_replicas=2)
    assert ReplicaConfig(ray="local", replicas=2).most_replicas == 2
    assert ReplicaConfig(ray="local", max_replicas=5).most_replicas == 5
