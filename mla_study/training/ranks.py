"""The processes of a run: torchrun's, or this one alone; and models sharded over them (FSDP2)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from mla_study.errors import UserError
from mla_study.model.transformer import Block, WanTransformer
from mla_study.training.recipe import Precision


@dataclass(frozen=True)
class Ranks:
    """Who we are among how many, and where we compute.

    Attributes:
        sharded: models are split over the ranks by FSDP2; not so for one process in float32.
    """

    rank: int
    count: int
    device: torch.device
    sharded: bool

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def share(self, batch: int) -> range:
        """This rank's places in a batch.

        Raises:
            UserError: a batch that the ranks cannot share equally.
        """
        if batch % self.count:
            raise UserError(
                f"a batch of {batch} does not divide over {self.count} ranks: "
                "give a multiple, or start fewer"
            )
        each = batch // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def mean(self, values: Tensor) -> Tensor:
        """The average over ranks of a tensor [n], in place (NaN anywhere stays)."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def which(self, flag: bool) -> list[int]:
        """The ranks whose flag is set; all ranks ask together."""
        flags = torch.zeros(self.count, device=self.device)
        flags[self.rank] = float(flag)
        if self.count > 1:
            dist.all_reduce(flags)
        return [rank for rank, value in enumerate(flags.tolist()) if value]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()

    def shard(self, model: WanTransformer, precision: Precision) -> None:
        """Split a model over the ranks, in place: its blocks, their cross-attention, the rest.

        Passes are in ``precision``; parameters, gradients and their reduction in float32.
        """
        if not self.sharded:
            return
        mesh = init_device_mesh(self.device.type, (self.count,))
        narrow = torch.bfloat16 if precision == "bf16" else None
        # timesteps must stay float32, so that inputs are not cast
        policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
        for block in cast("list[Block]", list(model.blocks)):
            # asked for its keys once, before the blocks run: a unit of its own
            fully_shard(block.cross_attn, mesh=mesh, mp_policy=policy)
            register_fsdp_forward_method(block.cross_attn, "keys")
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "condition")


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Generator[None, None, None]:
    """Leave out the reduction over ranks unless this is the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


@contextmanager
def ranks(device: str, precision: Precision) -> Generator[Ranks, None, None]:
    """Join torchrun's processes where there are any.

    Args:
        device: ``cpu`` or ``cuda``; with several ranks each takes the GPU of its local rank.

    Raises:
        UserError: another device, no GPU, or fewer GPUs than ranks on this machine.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise UserError(f"there is no device '{device}' to train on: give cpu or cuda")
    if place.type == "cuda":
        if not torch.cuda.is_available() or torch.cuda.device_count() <= local:
            raise UserError(
                f"rank {rank} wants GPU {local}, but torch sees {torch.cuda.device_count()}: "
                "use --device cpu, or start fewer ranks"
            )
        place = torch.device("cuda", place.index if count == 1 and place.index else local)
        torch.cuda.set_device(place)
    sharded = count > 1 or precision == "bf16"
    joined = sharded and not dist.is_initialized()
    if joined:
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        if count == 1:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    try:
        with warnings.catch_warnings():
            # what a module returns is written to by nobody here
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            yield Ranks(rank, count, place, sharded)
    finally:
        if joined:
            dist.destroy_process_group()
