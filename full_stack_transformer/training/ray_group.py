"""`fst train --ray_address`: the same command in every worker of Ray Train, as torchrun would start it.

    this command ──Ray Train──> a worker on each node ──> `fst train …` with RANK, WORLD_SIZE, MASTER_ADDR …
         ^────────────────────── relay: lines, exit codes ────┘  ^
         └────────────────────── relay: Ctrl-C, SIGTERM ─────────┘

Ray places the workers, notices one that is lost, and starts all of them again; what is trained, saved and
resumed is not known here. Each training is a process of its own below its worker: it has a main thread,
signals and an environment like one of torchrun, and ends with its worker.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from full_stack_transformer import interruption
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.arguments.typed import command_words
from full_stack_transformer.errors import LostPeerError, MachineError, UsageError
from full_stack_transformer.processes import RAY_VARIABLE
from full_stack_transformer.ray_cluster import Cluster, connected
from full_stack_transformer.training.ray_relay import Relay

logger = logging.getLogger(__name__)

# Of this command, for the processes on the other nodes.
_NOT_PASSED_ON = ("FST_API_KEYS", "FST_ADMIN_KEYS", "FST_TOLD_")
_PASSED_ON = ("FST_", "HF_", "AWS_", "NCCL_", "GLOO_", "TORCH_")
_PATHS = ("dataset_dir", "train_file", "validation_file", "test_file", "model_path", "resume")
_SECONDS_TO_JOIN = 0.2
# Of a process that SIGTERM does not end, since another one has failed.
_SECONDS_TO_END = 30.0
_PR_SET_PDEATHSIG = 1
_DESCRIPTORS = {"stdout": 1, "stderr": 2}


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What each worker is told."""

    relay: Any
    words: tuple[str, ...]
    """Of the command line."""
    address: str
    directory: str
    """The working directory of the command."""
    marker: str
    """A file below --experiments_root."""
    paths: dict[str, str]
    """Options, and what they name on this machine."""
    environment: dict[str, str] = field(repr=False)
    """Credentials of stores among it: Ray Train can be told to keep the text of what workers are told."""


def train_on_ray(arguments: TrainArguments) -> int:
    """Train on the cluster; the exit code of the training, which has said all that is to be said.

    Raises:
        MachineError: no cluster answers, it is too small, or it lost its processes too often.
        KeyboardInterrupt: by Ctrl-C before a process has begun.
    """
    words = command_words()
    if not words:
        raise UsageError("--ray_address is for a command line, not for Python code")
    assert arguments.ray_address is not None
    # Read by Ray Train where the training is prepared.
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_METRICS_ENABLED": "0"}
    with (
        connected(arguments.ray_address, modules=()) as cluster,
        _marked(arguments.experiments_root) as marker,
        # Ray Train wants a place for what it could save.
        tempfile.TemporaryDirectory(prefix="fst-ray-train-") as storage,
    ):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        relay = _start_relay(arguments.max_restarts)
        work = _Work(
            relay=relay,
            words=words,
            address=arguments.ray_address,
            directory=str(Path.cwd()),
            marker=str(marker.absolute()),
            paths=_paths_here(arguments),
            environment={
                name: value
                for name, value in os.environ.items()
                if name.startswith(_PASSED_ON) and not name.startswith(_NOT_PASSED_ON)
            },
        )
        trainer = DataParallelTrainer(
            _train_here,
            train_loop_config={"work": work},
            scaling_config=_scaling(arguments, cluster),
            run_config=ray.train.RunConfig(
                name="training",
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=arguments.max_restarts),
            ),
        )
        return _Run(trainer, relay, arguments).to_the_end()


def _start_relay(max_restarts: int) -> Any:
    """On this machine, as it ends with this command."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Relay).options(num_cpus=0, scheduling_strategy=here).remote(max_restarts)


def _paths_here(arguments: TrainArguments) -> dict[str, str]:
    found = {name: getattr(arguments, name) for name in _PATHS}
    return {
        name: str(value) for name, value in found.items() if value and Path(str(value)).exists()
    }


@contextmanager
def _marked(root: Path) -> Iterator[Path]:
    """A file below --experiments_root, by which a worker sees that it has the same one."""
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    marker = root / f".fst-ray-{uuid.uuid4().hex}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)
        if is_new and not any(root.iterdir()):
            root.rmdir()


def _scaling(arguments: TrainArguments, cluster: Cluster) -> Any:
    """How many workers there are, and what each of them has.

    Raises:
        MachineError: the cluster has too little.
    """
    uses_gpus = cluster.num_gpus > 0 and arguments.accelerator in ("auto", "gpu", "cuda")
    num_workers = arguments.ray_workers or (cluster.num_gpus if uses_gpus else cluster.num_nodes)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if uses_gpus:
        fitting, what, each = cluster.num_gpus, "GPU", {"GPU": 1.0, "CPU": 1.0}
    else:
        # As many CPUs for each as leave room for all.
        num_cpus = [int(node.get("CPU", 0)) for node in nodes]
        each_cpus = max(
            (
                n
                for n in range(1, max(num_cpus, default=0) + 1)
                if _fitting(num_cpus, n) >= num_workers
            ),
            default=1,
        )
        fitting, what, each = _fitting(num_cpus, each_cpus), "CPU", {"CPU": float(each_cpus)}
    if fitting < num_workers:
        raise MachineError(
            f"--ray_workers {num_workers}: the cluster has {cluster}, and each process needs a {what}; pass "
            "fewer, or add nodes"
        )
    return ray.train.ScalingConfig(
        num_workers=num_workers,
        use_gpu=uses_gpus,
        resources_per_worker=each,
        placement_strategy="PACK" if uses_gpus else "SPREAD",
    )


def _fitting(num_cpus: list[int], each: int) -> int:
    return sum(one // each for one in num_cpus)


class _Run:
    """One call of Ray Train, which waits in a thread, so that signals come here."""

    def __init__(self, trainer: Any, relay: Any, arguments: TrainArguments) -> None:
        self._trainer = trainer
        self._relay = relay
        self._arguments = arguments
        self._error: BaseException | None = None

    def to_the_end(self) -> int:
        """The exit code of the training."""
        fitting = threading.Thread(target=self._fit, daemon=True)
        showing = threading.Thread(target=self._show, daemon=True)
        with interruption.collected() as received, _sigterm_into(received):
            fitting.start()
            showing.start()
            num_sent = 0
            while fitting.is_alive():
                fitting.join(_SECONDS_TO_JOIN)
                for number in received[num_sent:]:
                    if not ray.get(self._relay.order.remote(number)):  # nothing has begun
                        if number == signal.SIGTERM:
                            return 128 + number
                        raise KeyboardInterrupt
                num_sent = len(received)
        code: int = ray.get(self._relay.close.remote())
        showing.join()
        if self._error is not None and not received:
            raise self._failure(self._error) from self._error
        if self._error is not None and code == 0:
            return 128 + received[0]
        return code

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._error = error

    def _show(self) -> None:
        """Write what the processes write, as it comes."""
        try:
            while (pieces := ray.get(self._relay.read.remote())) is not None:
                for stream, text in pieces:
                    # `connected` has directed sys.stdout elsewhere, for what Ray prints.
                    os.write(_DESCRIPTORS[stream], text)
        except RayError:  # the cluster is gone, and the other thread says so
            pass

    def _failure(self, error: BaseException) -> MachineError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next(
            (line for line in lines if _ENDED in line), lines[-1] if lines else repr(error)
        )
        name = self._arguments.experiment_name
        return MachineError(
            f"the training ended early, also after {self._arguments.max_restarts} new starts ({reason}): "
            f"what is saved is intact; add --resume auto to the command to go on with {name}"
        )


@contextmanager
def _sigterm_into(received: list[int]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# In each worker.

_ENDED = "a process of the training"


def _train_here(config: dict[str, Any]) -> None:
    """Run the command in this worker, as one process of the group."""
    work: _Work = config["work"]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    host = socket.gethostname()
    start = None
    if rank == 0:
        start = (*_free_address(), ray.get(work.relay.begin.remote()))
    address, port, num_restarts = broadcast_from_rank_zero(start)
    if mistake := _not_shared(work, host):
        ray.get(work.relay.complain.remote(mistake))
        return
    environment = {
        **os.environ,
        **work.environment,
        RAY_VARIABLE: work.address,
        # As torchrun sets them. Each worker sees its own device alone, so it is a machine of one process,
        # however many of them Ray has put on a node.
        "TORCHELASTIC_RUN_ID": "ray",
        "TORCHELASTIC_RESTART_COUNT": str(num_restarts),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "NODE_RANK": str(rank),
    }
    command = [sys.executable, "-m", "full_stack_transformer", *work.words]
    process = subprocess.Popen(
        command,
        cwd=work.directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C of the terminal comes by the relay, once
        preexec_fn=_end_with_this_thread,
    )
    code = _wait(process, work.relay)
    was_ordered = ray.get(work.relay.was_ordered.remote())
    if (code < 0 or code == LostPeerError.exit_code) and not was_ordered:
        how = f"was killed by signal {-code}" if code < 0 else "lost another one"
        reason = f"{_ENDED} {how} (number {rank} on {host})"
        ray.get(work.relay.lost.remote(reason))
        raise RuntimeError(reason)
    ray.get(work.relay.ended.remote(128 - code if code < 0 else code))


def _free_address() -> tuple[str, int]:
    address: str = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as bound:
        bound.bind((address, 0))
        port: int = bound.getsockname()[1]
    return address, port


def _not_shared(work: _Work, host: str) -> str | None:
    """What this node does not see of the files of the machine where the command was typed."""
    remedy = (
        "a training on several machines needs the same paths on each, as on a shared file system"
    )
    if not Path(work.directory).is_dir():
        return f"the working directory {work.directory} does not exist on {host}: {remedy}"
    if not Path(work.marker).is_file():
        root = Path(work.marker).parent
        return f"--experiments_root {root} is another directory on {host}: {remedy}"
    for name, path in work.paths.items():
        if not (Path(work.directory) / path).exists():
            return f"--{name} {path} does not exist on {host}: {remedy}"
    return None


def _end_with_this_thread() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: "subprocess.Popen[bytes]", relay: Any) -> int:
    """The exit code of a process; meanwhile its lines and signals are passed on."""
    readers = [
        threading.Thread(target=_pass_on, args=(stream, name, relay), daemon=True)
        for stream, name in ((process.stdout, "stdout"), (process.stderr, "stderr"))
    ]
    for reader in readers:
        reader.start()
    threading.Thread(target=_obey, args=(process, relay), daemon=True).start()
    code = process.wait()
    for reader in readers:
        reader.join()
    return code


def _pass_on(stream: Any, name: str, relay: Any) -> None:
    while text := os.read(stream.fileno(), 1 << 16):
        ray.get(relay.write.remote(name, text))


def _obey(process: "subprocess.Popen[bytes]", relay: Any) -> None:
    num_obeyed = 0
    while True:
        number = ray.get(relay.next_order.remote(num_obeyed))
        num_obeyed += 1
        if number == 0:  # another process has failed, and this one would wait for it
            process.terminate()
            time.sleep(_SECONDS_TO_END)
            process.kill()
            return
        process.send_signal(number)
