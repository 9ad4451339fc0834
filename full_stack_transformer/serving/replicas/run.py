"""`fst serve --ray_address`: replicas under Ray Serve, a front on every node, until SIGTERM.

    this process ──starts──> fronts, one a node ──Ray Serve's handle──> replicas, which Ray Serve restarts

Ray Serve's own proxies stay off. The end: fronts take nothing new and finish, then the replicas end.
"""

import contextlib
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from full_stack_transformer.arguments.serving import ServeArguments
from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.ray_cluster import Cluster, connected
from full_stack_transformer.serving.app import playground_files
from full_stack_transformer.serving.http.keys import Keys
from full_stack_transformer.serving.http.server import SECONDS_TO_SAY_ERRORS
from full_stack_transformer.serving.replicas.front import Front, FrontOptions, free_port
from full_stack_transformer.serving.replicas.replica import Replica
from full_stack_transformer.serving.replicas.router import BeginningRouter

logger = logging.getLogger(__name__)

_DEPLOYMENT = "Replica"
_SECONDS_BETWEEN_LOOKS = 5.0
_HEALTH_SECONDS = 2.0
# A replica that does not answer three times in a row is replaced; Ray Serve would give each 30 s.
_HEALTH_TIMEOUT_SECONDS = 10.0
_SECONDS_OF_PATIENCE = 20.0
_SECONDS_FOR_FRONT = 30.0
_MAX_STARTS = 3
# More load than this part of the slots calls for another replica: then texts begin to wait soon.
_TARGET_PART = 0.75
_UPSCALE_SECONDS, _DOWNSCALE_SECONDS = 10.0, 300.0
# A replica that knows the beginning may have this part of its slots more requests than the idlest one.
_MARGIN_PART = 0.5
_OWN_ERROR = re.compile(r"full_stack_transformer\.errors\.\w+: (?P<text>[^\n]+)")


def serve_replicas(arguments: ServeArguments, keys: Keys) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        MachineError: the cluster, its resources or the port are missing, or a node lacks the keys.
        ModelError: a replica cannot open the model.
        KeyboardInterrupt: by Ctrl-C, after the requests.
    """
    assert arguments.ray_address is not None
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    port = free_port(arguments.host, arguments.port)
    end = _End()
    try:
        with connected(arguments.ray_address) as cluster, _told_to_end(end):
            _serve(arguments, cluster, keys, port, end)
    except KeyboardInterrupt:  # before there was anything to finish
        if end.number != signal.SIGTERM:
            raise
    if end.number == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


def _serve(arguments: ServeArguments, cluster: Cluster, keys: Keys, port: int, end: "_End") -> None:
    """Serve until the end is told."""
    num_keys = (keys.clients.num_keys, keys.admins.num_keys)
    _check_resources(arguments, cluster)
    with _deployed(arguments, cluster, f"fst-{port}", num_keys) as application:
        end.is_awaited = True
        options = FrontOptions(
            arguments=arguments,
            application=application,
            deployment=_DEPLOYMENT,
            port=port,
            num_keys=num_keys,
            open_paths=tuple(playground_files()),
        )
        fronts = _Fronts(options)
        try:
            fronts.follow_nodes()
            _announce(arguments, port, len(fronts), keys)
            while not end.wait(_SECONDS_BETWEEN_LOOKS):
                fronts.follow_nodes()
        finally:
            fronts.stop()


class _End(threading.Event):
    number = 0
    """Of the signal."""
    is_awaited = False
    """Whether somebody looks at it; until then a signal interrupts, as models load for minutes."""


@contextlib.contextmanager
def _told_to_end(end: _End) -> Iterator[None]:
    """Set by the first SIGTERM or Ctrl-C; a second Ctrl-C interrupts at once."""

    def tell(number: int, frame: object) -> None:
        is_second = end.is_set() and number == signal.SIGINT
        end.number = end.number or number
        end.set()
        if is_second or not end.is_awaited:
            raise KeyboardInterrupt

    before = {one: signal.signal(one, tell) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_resources(arguments: ServeArguments, cluster: Cluster) -> None:
    """Refuse what Ray would wait for forever.

    Raises:
        MachineError: the fewest replicas do not fit.
    """
    fewest, _ = arguments.replica_bounds
    wanted = {
        "CPU": (fewest * arguments.cpus_per_replica, cluster.num_cpus),
        "GPU": (fewest * _num_gpus(arguments, cluster), cluster.num_gpus),
    }
    for name, (needed, there) in wanted.items():
        if needed > there:
            raise MachineError(
                f"{fewest} replicas need {needed:g} {name}s, the cluster has {there:g}; start fewer "
                f"--replicas, with less --{name.lower()}s_per_replica, or add nodes"
            )


def _num_gpus(arguments: ServeArguments, cluster: Cluster) -> float:
    if arguments.gpus_per_replica is not None:
        return arguments.gpus_per_replica
    return float(cluster.num_gpus > 0 and arguments.device in ("auto", "cuda"))


@contextlib.contextmanager
def _deployed(
    arguments: ServeArguments, cluster: Cluster, name: str, num_keys: tuple[int, int]
) -> Iterator[str]:
    """The name of an application of Ray Serve whose replicas are ready; deleted at the end."""
    _start_ray_serve()
    if name in serve.status().applications:  # of a command that was killed
        serve.delete(name)
    deployment = serve.deployment(Replica).options(**_options(arguments, cluster))
    try:
        with _patience_asked():
            serve.run(deployment.bind(arguments, num_keys), name=name, route_prefix=None)
        yield name
    except RuntimeError as error:
        found = _OWN_ERROR.findall(str(error))
        if not found:
            raise
        raise ModelError(f"a replica cannot start: {found[-1]}") from None
    finally:
        # Ray Serve itself goes on: another service may just be starting on it.
        serve.delete(name)


@contextlib.contextmanager
def _patience_asked() -> Iterator[None]:
    """Say what is free in the cluster where replicas are long in coming; Ray waits without a word."""

    def tell() -> None:
        free = ray.available_resources()
        logger.info(
            "still waiting for the replicas; the cluster has %g CPUs and %g GPUs free",
            *(free.get(name, 0) for name in ("CPU", "GPU")),
        )

    timer = threading.Timer(_SECONDS_OF_PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start_ray_serve() -> None:
    """Once for a cluster, without its proxies."""
    try:
        serve.start(proxy_location="Disabled")
    except ray.exceptions.ActorAlreadyExistsError:  # another command has just done it
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        serve.start(proxy_location="Disabled")


def _options(arguments: ServeArguments, cluster: Cluster) -> dict[str, Any]:
    """Of the deployment."""
    fewest, most = arguments.replica_bounds
    slots, num_models = arguments.max_batch_size, 1 + len(arguments.more_models)
    num_threads = str(arguments.cpus_per_replica)
    scale: dict[str, Any] = {"num_replicas": fewest}
    if fewest < most:
        scale = {
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": most,
                "target_ongoing_requests": max(1.0, _TARGET_PART * slots),
                "upscale_delay_s": _UPSCALE_SECONDS,
                "downscale_delay_s": _DOWNSCALE_SECONDS,
            }
        }
    return scale | {
        "name": _DEPLOYMENT,
        "ray_actor_options": {
            "num_cpus": arguments.cpus_per_replica,
            "num_gpus": _num_gpus(arguments, cluster),
            # Without it a replica on a cluster of this machine would compute with all of its cores.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": num_threads}},
        },
        # The queues of a replica say 429 to a client before this is reached.
        "max_ongoing_requests": num_models * (slots + 2 * arguments.max_queue_size) + 8,
        "max_queued_requests": max(1, 2 * arguments.max_queue_size),
        "graceful_shutdown_timeout_s": arguments.shutdown_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": _HEALTH_SECONDS,
        "health_check_timeout_s": _HEALTH_TIMEOUT_SECONDS,
        "max_constructor_retry_count": _MAX_STARTS,
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
        "request_router_config": RequestRouterConfig(
            request_router_class=BeginningRouter,
            request_router_kwargs={
                "margin": max(1, int(_MARGIN_PART * slots)),
                # Without caches of beginnings all are unknown.
                "by_beginning": arguments.routing == "beginning"
                and arguments.prefix_cache != "off",
            },
        ),
    }


class _Fronts:
    """The fronts of all nodes; Ray restarts one that ends."""

    def __init__(self, options: FrontOptions) -> None:
        self._options = options
        self._fronts: dict[str, Any] = {}
        self._problems: dict[str, str] = {}
        self._has_begun = False

    def __len__(self) -> int:
        return len(self._fronts)

    def follow_nodes(self) -> None:
        """Start what is missing, and what has ended.

        Raises:
            MachineError: no front can serve, at the first look.
        """
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for gone in self._fronts.keys() - alive:
            del self._fronts[gone]
        known = dict(self._fronts)
        new = {node: self._start(node) for node in alive - known.keys()}
        for node, front in (known | new).items():
            problem = _problem_of(front, is_new=node in new)
            if problem is None:
                self._fronts[node] = front
                self._problems.pop(node, None)
                continue
            ray.kill(front)
            self._fronts.pop(node, None)
            if self._problems.get(node) != problem:
                logger.warning("no front on node %s: %s", node, problem)
            self._problems[node] = problem
        if not self._fronts and not self._has_begun:
            raise MachineError(next(iter(self._problems.values()), "the cluster has no node"))
        self._has_begun = True

    def stop(self) -> None:
        """Let all finish at once, then end them."""
        limits = self._options.arguments
        seconds = limits.shutdown_delay_seconds + limits.shutdown_seconds
        stopping = [front.stop.remote() for front in self._fronts.values()]
        ray.wait(
            stopping,
            num_returns=len(stopping),
            timeout=seconds + 2 * SECONDS_TO_SAY_ERRORS,
        ) if stopping else None
        for front in self._fronts.values():
            ray.kill(front)

    def _start(self, node: str) -> Any:
        actor = ray.remote(Front).options(
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=4,
            name=f"{self._options.application}-front-{node}",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        return actor.remote(self._options)


def _problem_of(front: Any, *, is_new: bool) -> str | None:
    """Why a front does not serve; one that Ray is just restarting is left to Ray."""
    try:
        problem: str | None = ray.get(front.problem.remote(), timeout=_SECONDS_FOR_FRONT)
    except ray.exceptions.RayError as error:
        return f"it does not start ({type(error).__name__})" if is_new else None
    return problem


def _announce(arguments: ServeArguments, port: int, num_fronts: int, keys: Keys) -> None:
    """Log the address."""
    host = arguments.host
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 (only shown)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    if keys.clients.is_open and not (host.startswith("127.") or host == "::1"):
        logger.warning(
            "anybody who reaches %s may use this service; set FST_API_KEYS or --api_keys_file", host
        )
    logger.info(
        "serving %s with %s replicas at %s, on each of %d nodes (documentation: %s/docs; %s)",
        *(arguments.served_model_name or arguments.model, arguments.replicas, url, num_fronts, url),
        "no keys" if keys.clients.is_open else f"{keys.clients.num_keys} keys",
    )
