"""The request router of Ray Serve that knows the beginnings of requests; it runs in each front."""

from typing import Any

from ray.serve.request_router import (  # type: ignore[import-untyped, unused-ignore]
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from full_stack_transformer.serving.replicas.affinity import Affinity
from full_stack_transformer.serving.replicas.requests import ForwardedRequest


class BeginningRouter(RequestRouter):
    """Chooses with `Affinity`, by the lengths of queues that this front knows."""

    def initialize_state(self, margin: int, by_beginning: bool) -> None:
        """Called by Ray Serve with the deployment's `request_router_kwargs`."""
        self._affinity = Affinity(margin)
        self._by_beginning = by_beginning

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replica of choice, then all others."""
        by_name = {str(one.replica_id): one for one in candidate_replicas}
        # A queue that nothing was heard of for seconds is a quiet one.
        queues = {
            name: self.replica_queue_len_cache.get(one.replica_id) or 0
            for name, one in by_name.items()
        }
        full = {name for name, one in by_name.items() if queues[name] >= one.max_ongoing_requests}
        if len(full) < len(queues):
            queues = {name: length for name, length in queues.items() if name not in full}
        if not queues:
            return []
        chosen = self._affinity.choose(self._beginning_of(pending_request), queues)
        others = [one for name, one in by_name.items() if name != chosen]
        return [[by_name[chosen]], others]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remember who reads what."""
        self._affinity.note(self._beginning_of(pending_request), str(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve when replicas come and go."""
        super().update_replicas(replicas)
        self._affinity.keep({str(one.replica_id) for one in replicas})

    def _beginning_of(self, pending_request: PendingRequest | None) -> tuple[bytes, ...]:
        if pending_request is None or not pending_request.args or not self._by_beginning:
            return ()
        request = pending_request.args[0]
        return request.beginning if isinstance(request, ForwardedRequest) else ()
