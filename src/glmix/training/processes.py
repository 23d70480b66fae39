"""The processes that torchrun or SLURM started, and what they do together; by Lightning and torch.distributed."""

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from glmix.errors import needs


def started() -> tuple[int, int] | None:
    """Processes a machine, and machines, as torchrun or SLURM tell; None where neither started this one."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        devices = int(environment["LOCAL_WORLD_SIZE"])
        return devices, int(environment["WORLD_SIZE"]) // devices
    if "SLURM_NTASKS_PER_NODE" in environment:
        return int(environment["SLURM_NTASKS_PER_NODE"]), int(environment.get("SLURM_NNODES", 1))
    return None


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


def join_processes() -> Processes:
    """Join those that were started together, so that they can share work; alone where this process is.

    Raises:
        UserError: there are several, and Lightning is not installed.
    """
    devices, nodes = started() or (1, 1)
    if devices * nodes == 1:
        return Processes()
    with needs("train"):
        from lightning.fabric import Fabric
    fabric = Fabric(accelerator="auto", strategy="ddp", devices=devices, num_nodes=nodes)
    fabric.launch()
    return Processes(fabric.global_rank, fabric.world_size)


def gathered(value: Any) -> list[Any]:
    """Plain data of every process, in their order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
