"""The processes of a run: who am I, what is my share, what did the others find. A thin layer over torch.distributed;
one process without a launcher works too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from kernels.errors import MetronomeError
from model.program import gpu
from model.program.heartbeat import SILENT_S, Heartbeat
from model.program.launched import Launched
from model.program.startup import accelerator, import_deepspeed

MEET_S = 300.0
"""So long processes wait for one another at the start."""

_heartbeat: Heartbeat | None = None


def join(silent_s: float = SILENT_S) -> None:
    """Joins the launcher's processes, over gloo on the CPU and nccl between GPUs; without a launcher this process is a
    world of its own. From then on a process that does not answer for ``silent_s`` seconds is named and ends the run.

    Raises MetronomeError for a launcher's variables that do not fit, a port that is taken, and processes that do not
    come within `MEET_S`."""
    global _heartbeat
    launched = Launched.read()
    store: dist.Store = dist.HashStore()
    if launched is None:
        rank = local_rank = 0
        world = 1
    else:
        rank, world, local_rank = launched.rank, launched.world, launched.local_rank
        store = _meet(launched)
    backend = "gloo"
    if accelerator() == "cuda":
        gpu.take(local_rank)
        backend = gpu.COLLECTIVES
    timeout = dist.distributed_c10d.default_pg_timeout
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    with rank_for_deepspeed():
        import_deepspeed().init_distributed(dist_backend=backend, verbose=False)
    if launched is not None and world > 1:
        _heartbeat = Heartbeat(rank, (launched.address, launched.port), gather, silent_s)


@contextmanager
def joined() -> Iterator[None]:
    """`join`, and `leave` at the block's end; within such a block, nothing."""
    if dist.is_initialized():
        yield
        return
    join()
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # a lost GPU or process cannot be left in order: what was raised first is the news
            leave()
        raise
    leave()


@contextmanager
def rank_for_deepspeed() -> Iterator[None]:
    """A block in which LOCAL_RANK is set, without which DeepSpeed does not begin; without a launcher it is gone again
    afterwards, because accelerate would take it for one's."""
    if "LOCAL_RANK" in os.environ:
        yield
        return
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]


def leave() -> None:
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.stop()
        _heartbeat = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(launched: Launched) -> dist.Store:
    """The store in which the processes find one another."""
    launched.check_address()
    try:
        store: dist.Store = next(
            rendezvous("env://", launched.rank, launched.world, timeout=timedelta(seconds=MEET_S))
        )[0]
    except dist.DistError as error:
        place = f"{launched.address}:{launched.port} (MASTER_ADDR, MASTER_PORT)"
        if "EADDRINUSE" in str(error):
            raise MetronomeError(
                f"{place} is in use by another program or run; choose another port (--main_process_port)"
            ) from error
        raise MetronomeError(
            f"the {launched.world} processes of this run (WORLD_SIZE) have not all met at {place} within {MEET_S:g} s: "
            "start them all, with the same address and port"
        ) from error
    store.set_timeout(dist.distributed_c10d.default_pg_timeout)
    return store


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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
