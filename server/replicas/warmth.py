"""Which replica a request should go to: where its conversation or its cluster's pack is warm, unless others idle."""

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .messages import Hint

__all__ = ["Place", "WarmPacks", "Warmth", "share_of"]

_MAX_CONVERSATIONS = 10_000
"""That are remembered; a conversation that is forgotten goes by its cluster again."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A replica that could take a request.

    Attributes:
        load: requests that it has now.
        num_at_once: of them, those that it answers at once; the others wait in it.
        limit: most that it takes.
    """

    replica: str
    load: int
    num_at_once: int
    limit: int


def share_of(num_clusters: int, num_replicas: int) -> int:
    """Packs that each replica should keep warm, so that together they keep all."""
    return -(-num_clusters // max(1, num_replicas))


class WarmPacks:
    """The packs that each replica used last."""

    def __init__(self) -> None:
        """Begin with cold replicas."""
        self._used: dict[str, OrderedDict[int, None]] = {}

    def note(self, replica: str, cluster: int, *, at_most: int) -> bool:
        """Note that a replica uses a pack.

        Args:
            at_most: packs that stay warm there.
        Returns:
            Whether it was warm.
        """
        used = self._used.setdefault(replica, OrderedDict())
        was_warm = cluster in used
        used[cluster] = None
        used.move_to_end(cluster)
        while len(used) > at_most:
            used.popitem(last=False)
        return was_warm

    def has(self, replica: str, cluster: int) -> bool:
        """Whether a pack is warm at a replica."""
        return cluster in self._used.get(replica, ())

    def num_warm(self, replica: str) -> int:
        """Number of packs that are warm at a replica."""
        return len(self._used.get(replica, ()))

    def places(self) -> Counter[int]:
        """At how many replicas each pack is warm, of those that are at any."""
        return Counter(cluster for used in self._used.values() for cluster in used)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all other replicas."""
        self._used = {replica: used for replica, used in self._used.items() if replica in replicas}


class Warmth:
    """What is warm where, by the requests that were sent.

    Replicas share the packs out: each cluster has a home, or several where there is room for more. A request that has
    to go elsewhere does not move its cluster's home, so that one rush does not mix up all of them.
    """

    def __init__(self, num_clusters: int) -> None:
        """Begin with cold replicas."""
        self._num_clusters = num_clusters
        self._homes = WarmPacks()
        self._conversations: OrderedDict[str, str] = OrderedDict()

    def ranked(self, places: Sequence[Place], hint: Hint) -> list[list[str]]:
        """Sort replicas into ranks, the best first; within a rank the least load counts.

        A cluster that has no home gets one: at once, because the next requests of it may come before this one is sent.
        """
        least = min((place.load for place in places), default=0)
        able = [place for place in places if _is_able(place, least)]
        self._homes.keep([place.replica for place in places])
        if hint.cluster is not None and able and hint.cluster not in self._homes.places():
            fewest = min(able, key=lambda place: (self._homes.num_warm(place.replica), place.load))
            self._homes.note(fewest.replica, hint.cluster, at_most=share_of(self._num_clusters, len(places)))
        known = self._conversations.get(hint.conversation or "") if hint.continues else None
        ranks = (
            [place.replica for place in able if place.replica == known],
            [
                place.replica
                for place in able
                if hint.cluster is not None and self._is_home(place.replica, hint.cluster)
            ],
            [place.replica for place in places],
        )
        return [rank for rank in ranks if rank]

    def note(self, replica: str, hint: Hint, replicas: Collection[str]) -> None:
        """Note that a request was sent to one of all replicas."""
        share, cluster = share_of(self._num_clusters, len(replicas)), hint.cluster
        if cluster is not None and (self._is_home(replica, cluster) or self._has_room(replica, share, len(replicas))):
            self._homes.note(replica, cluster, at_most=share)
        if hint.conversation is not None:
            self._conversations[hint.conversation] = replica
            self._conversations.move_to_end(hint.conversation)
            if len(self._conversations) > _MAX_CONVERSATIONS:
                self._conversations.popitem(last=False)

    def _is_home(self, replica: str, cluster: int) -> bool:
        return self._homes.has(replica, cluster)

    def _has_room(self, replica: str, share: int, num_replicas: int) -> bool:
        """Whether a replica can be one more home of a cluster, and those that have none still find one."""
        homes = self._homes.places()
        num_free = share * num_replicas - homes.total()
        return self._homes.num_warm(replica) < share and num_free > self._num_clusters - len(homes)


def _is_able(place: Place, least: int) -> bool:
    """Whether a warm replica is better than an idler one, which is quickly warmed.

    It is not when it is full, when a request would wait in it and not in the idlest, or when it has more requests than
    the idlest by half of what it answers at once.
    """
    waits_needlessly = place.load >= place.num_at_once and least < place.num_at_once
    return place.load < place.limit and not waits_needlessly and place.load - least <= max(1, place.num_at_once // 2)
