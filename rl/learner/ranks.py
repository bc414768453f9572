"""The processes of a run: who am I, what is my share, what did the others find. A thin layer over torch.distributed;
one process without a launcher works too."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.program.startup import accelerator, import_deepspeed


def join() -> None:
    """Joins the launcher's processes, over gloo on the CPU and nccl between GPUs; without a launcher this process is a
    world of its own."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    backend = "cpu:gloo,cuda:nccl" if accelerator() == "cuda" else "gloo"
    if accelerator() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import_deepspeed().init_distributed(dist_backend=backend, verbose=False)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world() -> int:
    """How many of the processes run on this machine; the launcher says so."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def share(count: int) -> range:
    """The contiguous indices of ``count`` items that this rank works on; together the ranks cover all, in order."""
    return range(rank() * count // world(), (rank() + 1) * count // world())


def gather(value: Any) -> list[Any]:
    """Everyone's value, in rank order, on every rank (pickled: for small records)."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def agree(what: str, value: str) -> None:
    """Raises RuntimeError on every rank when ranks hold different values of what must be equal."""
    values = gather(value)
    if len(set(values)) > 1:
        raise RuntimeError(f"{what} differs between ranks: {values}; the run cannot go on")


def sum_in_order(own: Tensor) -> Tensor:
    """The ranks' tensors added in rank order, so that every rank holds the same bits; [n] -> [n].

    Each rank adds one slice for all, then the slices are gathered: a rank receives about twice its tensor, however
    many ranks there are. Which rank adds an element does not enter its sum."""
    if world() == 1:
        return own
    slice_size = -(-len(own) // world())
    padded = torch.nn.functional.pad(own, (0, slice_size * world() - len(own)))
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    total, *rest = received.view(world(), slice_size)
    for part in rest:
        total += part
    dist.all_gather_into_tensor(padded, total)
    return padded[: len(own)]
