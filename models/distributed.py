"""The processes of a run: one alone, or several under torchrun that share every global batch."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nestloop.models.errors import RecipeError


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Every method does nothing costly where there is one process."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, on every process; any shape."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, on every process, by rank."""
        if self.world == 1:
            return items
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over processes."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def own_rank() -> int:
    """The number of this process among those that torchrun started, 0 where it is alone; without joining them."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or runs alone.

    device: "auto", "cpu" or "cuda"; gloo connects CPU processes, nccl CUDA ones.
    """
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise RecipeError(
            "this torch has no CUDA device",
            given="--device cuda",
            need="a CUDA build and a GPU",
            fix="--device cpu",
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if world > 1:
        # DistributedDataParallel imports Dynamo, whose default arguments hold the group of that moment for good.
        importlib.import_module("torch._dynamo")
        dist.init_process_group("nccl" if use_cuda else "gloo")
    try:
        yield Ranks(own_rank(), world, chosen)
    finally:
        if world > 1:
            dist.destroy_process_group()
            # The group's threads end with its last reference, which a wrapped model's cycles hold: one that still
            # releases a tensor while the interpreter shuts down aborts the process.
            gc.collect()
