"""The choice of `warmth.py` as Ray Serve's router of requests, which runs in the front's process."""

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .messages import Asked, Hint
from .warmth import Place, Warmth

__all__ = ["ClusterRouter"]


class ClusterRouter(RequestRouter):  # type: ignore[misc]
    """Ranks replicas for a request; Ray Serve takes the least loaded of the first rank that has a place.

    It also counts requests, waits when all places are taken, and notices replicas that come and go.
    """

    # Its own 0.1 s are short for a process that computes on all of its cores.
    queue_len_response_deadline_s = 1.0

    def initialize_state(self, *, num_clusters: int, num_at_once: int) -> None:
        """Begin with cold replicas; Ray Serve passes what the deployment's configuration says."""
        self._warmth, self._num_at_once = Warmth(num_clusters), num_at_once

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the candidates."""
        hint = _hint(pending_request)
        found = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        places = [
            Place(
                replica=name,
                # Not known of one that is new or was not asked for long; Ray Serve asks it then.
                load=self.replica_queue_len_cache.get(replica.replica_id) or 0,
                num_at_once=self._num_at_once,
                limit=replica.max_ongoing_requests,
            )
            for name, replica in found.items()
        ]
        return [[found[name] for name in rank] for rank in self._warmth.ranked(places, hint)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Remember what becomes warm."""
        replicas = {known.unique_id for known in self.curr_replicas}
        self._warmth.note(replica_id.unique_id, _hint(pending_request), replicas)


def _hint(pending_request: PendingRequest | None) -> Hint:
    asked = pending_request.args[0] if pending_request is not None and pending_request.args else None
    # The front also asks for facts, which any replica has.
    return asked.hint if isinstance(asked, Asked) else Hint()
