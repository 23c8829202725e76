"""Which replica a request should go to: where its conversation or its cluster's pack is warm, unless others idle."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .messages import Hint

__all__ = ["Place", "Warmth", "WarmPacks"]

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


class WarmPacks:
    """The packs that each replica used last: as many as are its share of all, so that replicas share them out."""

    def __init__(self, num_clusters: int) -> None:
        """Begin with cold replicas."""
        self._num_clusters = num_clusters
        self._used: dict[str, OrderedDict[int, None]] = {}

    def note(self, replica: str, cluster: int, *, num_replicas: int) -> bool:
        """Note that a replica uses a pack; returns whether it was warm there."""
        used = self._used.setdefault(replica, OrderedDict())
        was_warm = cluster in used
        used[cluster] = None
        used.move_to_end(cluster)
        while len(used) > -(-self._num_clusters // num_replicas):
            used.popitem(last=False)
        return was_warm

    def has(self, replica: str, cluster: int) -> bool:
        """Whether a pack is warm at a replica."""
        return cluster in self._used.get(replica, ())

    def num_warm(self, replica: str) -> int:
        """Number of packs that are warm at a replica."""
        return len(self._used.get(replica, ()))

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all other replicas."""
        self._used = {replica: used for replica, used in self._used.items() if replica in replicas}


class Warmth:
    """What is warm where, by the requests that were sent."""

    def __init__(self, num_clusters: int) -> None:
        """Begin with cold replicas."""
        self._packs = WarmPacks(num_clusters)
        self._conversations: OrderedDict[str, str] = OrderedDict()

    def ranked(self, places: Sequence[Place], hint: Hint) -> list[list[str]]:
        """Sort replicas into ranks, the best first; within a rank the least load counts, and of equals the order."""
        least = min((place.load for place in places), default=0)
        able = [place for place in places if _is_able(place, least)]
        home = self._conversations.get(hint.conversation or "")
        cluster = hint.cluster
        same = [place.replica for place in able if place.replica == home]
        warm = [place.replica for place in able if cluster is not None and self._packs.has(place.replica, cluster)]
        # A cluster that is warm nowhere goes, of equally loaded replicas, to the one with the fewest.
        rest = sorted((place.replica for place in places), key=self._packs.num_warm)
        return [rank for rank in (same, warm, rest) if rank]

    def note(self, replica: str, hint: Hint, replicas: Collection[str]) -> None:
        """Note that a request was sent to one of all replicas."""
        self._packs.keep(replicas)
        if hint.cluster is not None:
            self._packs.note(replica, hint.cluster, num_replicas=max(1, len(replicas)))
        if hint.conversation is not None:
            self._conversations[hint.conversation] = replica
            self._conversations.move_to_end(hint.conversation)
            if len(self._conversations) > _MAX_CONVERSATIONS:
                self._conversations.popitem(last=False)


def _is_able(place: Place, least: int) -> bool:
    """Whether a warm replica is better than an idler one, which is quickly warmed.

    It is not when it is full, when a request would wait in it and not in the idlest, or when it has more requests than
    the idlest by half of what it answers at once.
    """
    waits_needlessly = place.load >= place.num_at_once and least < place.num_at_once
    return place.load < place.limit and not waits_needlessly and place.load - least <= max(1, place.num_at_once // 2)
