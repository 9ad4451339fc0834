"""What replicas and fronts share: who they are, and the keys of their node."""

from dataclasses import dataclass

import ray
from ray import serve

from full_stack_transformer.arguments.serving import ServeArguments
from full_stack_transformer.errors import MachineError
from full_stack_transformer.serving.http.keys import Keys


@dataclass(frozen=True)
class ReplicaState:
    """What a replica says of itself."""

    name: str
    node: str
    num_running: int
    num_waiting: int


def read_same_keys(arguments: ServeArguments, num_keys: tuple[int, int]) -> Keys:
    """The keys of this node, which never travel: a node that lacks them must not be open to everybody.

    Raises:
        MachineError: there are others than where the command was typed.
        UsageError: a file cannot be read.
    """
    keys = Keys.read(arguments)
    found = (keys.clients.num_keys, keys.admins.num_keys)
    if found != num_keys:
        raise MachineError(
            f"node {whereabouts()[1]}: found {found[0]} keys and {found[1]} admin keys, but fst serve was "
            f"started with {num_keys[0]} and {num_keys[1]}; keys are read on each node, so give it the same "
            "--api_keys_file, or set FST_API_KEYS before its ray start"
        )
    return keys


def whereabouts() -> tuple[str, str]:
    """Names of this replica and of its node."""
    node = str(ray.get_runtime_context().get_node_id())
    try:
        return str(serve.get_replica_context().replica_id.unique_id), node
    except serve.exceptions.RayServeException:  # a front
        return "", node
