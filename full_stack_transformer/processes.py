"""Processes that train together: which of them this is, and what the main one decides for all.

    torchrun, srun   start all of them; they find each other by the launcher's variables
    Ray Train        the same, with the variables of torchrun (`training.ray_group`)
    --devices N      Lightning starts the others, which inherit the variables of the main one

Reads the environment alone: nothing is connected, and torch is imported only where processes must talk. One
writes and speaks for all; the others work in silence.
"""

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from full_stack_transformer.errors import LostPeerError

RAY_VARIABLE = "FST_RAY_ADDRESS"
"""The --ray_address that started this process."""
_TOLD = "FST_TOLD_"
_decisions = itertools.count()
# The main process may be reading a large data set.
_LONGEST_WAIT = timedelta(minutes=30)
# A launcher ends all processes within a second of the first that ends.
_SECONDS_TO_SPEAK = 15.0
# srun has these names for a shell in which somebody types.
_SHELLS_OF_SLURM = ("bash", "interactive")


@dataclass(frozen=True)
class Launch:
    """What started this process together with others."""

    rank: int
    """Number of this process, from 0."""
    num_processes: int
    """On all machines."""
    num_on_this_machine: int
    is_torchrun: bool
    """Or else srun."""
    num_restarts: int = 0
    """How often torchrun has started all of them anew."""
    ray_address: str | None = None
    """Where Ray did, in the place of torchrun."""

    @property
    def num_machines(self) -> int:
        """Each has equally many processes."""
        return max(1, self.num_processes // self.num_on_this_machine)


def launch() -> Launch | None:
    """What started this process with others; None for a command that was started alone, or by Lightning."""
    found = os.environ
    if "TORCHELASTIC_RUN_ID" in found:
        return Launch(
            rank=int(found["RANK"]),
            num_processes=int(found["WORLD_SIZE"]),
            num_on_this_machine=int(found["LOCAL_WORLD_SIZE"]),
            is_torchrun=True,
            num_restarts=int(found.get("TORCHELASTIC_RESTART_COUNT", 0)),
            ray_address=found.get(RAY_VARIABLE),
        )
    # Only what srun starts has it: a batch script has the tasks of its job (SLURM_NTASKS), but is alone.
    if "SLURM_STEP_NUM_TASKS" in found and found.get("SLURM_JOB_NAME") not in _SHELLS_OF_SLURM:
        num_tasks = int(found["SLURM_STEP_NUM_TASKS"])
        # How many each machine has is told only where --ntasks-per-node was given.
        each = num_tasks // int(found.get("SLURM_STEP_NUM_NODES", 1))
        return Launch(
            rank=int(found.get("SLURM_PROCID", 0)),
            num_processes=num_tasks,
            num_on_this_machine=int(found.get("SLURM_NTASKS_PER_NODE") or max(1, each)),
            is_torchrun=False,
        )
    return None


def is_main_process() -> bool:
    """Whether this process writes and speaks; known before the processes are connected."""
    found = launch()
    if found is not None:
        return found.rank == 0
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))


def agreed(name: str, decide: Callable[[], str], *, otherwise: str = "") -> str:
    """What the main process decides, in each process; all of them must call this.

    Args:
        name: of the decision.
        decide: called in the main process alone.
        otherwise: where the main process cannot be asked: Lightning started this one on another machine.

    Raises:
        MachineError: the main process has ended.
    """
    found, key = launch(), f"{name}/{next(_decisions)}"
    if is_main_process():
        # Opened before the decision: should that fail, those who wait hear of the end.
        store = _store() if found is not None and found.num_processes > 1 else None
        decision = decide()
        os.environ[_TOLD + name] = decision  # for those that Lightning starts
        if store is not None:
            store.set(key, decision)
        return decision
    if found is None:
        return os.environ.get(_TOLD + name, otherwise)
    store = _store()
    try:
        heard: bytes = store.get(key)
    except RuntimeError as error:  # also those of torch.distributed
        raise LostPeerError(f"the main process has ended, or cannot be reached: {error}") from error
    return heard.decode()


@cache
def _store() -> Any:
    """Where the processes leave notes for each other; the one in which torch later connects them."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    found = launch()
    assert found is not None
    if not found.is_torchrun:
        from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

        environment = SLURMEnvironment()  # sets the variables by which torch finds the main process
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
    try:
        places = rendezvous("env://", found.rank, found.num_processes, timeout=_LONGEST_WAIT)
        store, _, _ = next(places)
    except RuntimeError as error:
        raise LostPeerError(f"the other processes cannot be reached: {error}") from error
    return PrefixStore("fst", store)


def may_speak() -> bool:
    """Whether this process is to tell its error; of the others each waits for the main one to tell it.

    The launcher then ends them. It does not where the error is in this process alone, which is heard.
    """
    if is_main_process():
        return True
    parent, end = os.getppid(), time.monotonic() + _SECONDS_TO_SPEAK
    while time.monotonic() < end:
        time.sleep(0.1)
        if os.getppid() != parent:
            return False
    return True


def quieten_others() -> None:
    """Let the others log errors alone."""
    if not is_main_process():
        logging.getLogger().setLevel(logging.ERROR)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of torch tells that another process has ended."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "gloo/transport" in words
        or "connection closed by peer" in words
        or "connection reset by peer" in words
        or "nccl" in words
        or type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    )
