"""The ranks of a training run agree before they part: a collective that only some of them enter is half an hour's wait.

Clocks differ from rank to rank, and so does what a file system or an object store shows them. Whatever decides whether
a collective follows (a checkpoint's report, a row that is skipped, an epoch to resume from, an early end) is decided
by rank 0 alone and told to the others, which is itself a collective that all of them enter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This worker's place among `world` workers; `device` is where collectives take tensors (NCCL: the GPU)."""

    rank: int
    world: int
    device: Any = "cpu"

    def decide(self, asked: Callable[[], T]) -> T:
        """What rank 0 answers, on every rank; the others are not asked."""
        if self.world == 1:
            return asked()
        import torch.distributed

        told: list[Any] = [asked() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(told, src=0, device=self.device)
        answer: T = told[0]
        return answer

    def most(self, value: int) -> int:
        """The largest value of all ranks, on every rank."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed

        found = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return int(found)

    def total(self, counts: Any) -> list[int]:
        """The sums over the ranks of an int64 [n] tensor on their device: exact, and the same on each."""
        if self.world > 1:
            import torch.distributed

            torch.distributed.all_reduce(counts)
        return [int(n) for n in counts.tolist()]

    def share_buffers(self, model: Any) -> None:
        """Give every rank rank 0's running statistics, which are published: DDP averages gradients, and these not."""
        if self.world > 1:
            import torch.distributed

            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def add_up(self, tensors: Sequence[Any]) -> None:
        """Each tensor becomes its sum over the ranks, by one collective: the same bits on each."""
        if self.world == 1:
            return
        import torch
        import torch.distributed

        flat = torch.cat([t.detach().flatten() for t in tensors]).to(self.device)
        torch.distributed.all_reduce(flat)
        with torch.no_grad():
            for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """What each rank gives, in their order, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed

        told: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(told, value)
        return told

    def mean(self, value: Any) -> float:
        """The mean of a scalar tensor over the ranks: the same float on each."""
        if self.world == 1:
            return float(value)
        import torch
        import torch.distributed

        total = value.detach().to(torch.float64).clone()
        torch.distributed.all_reduce(total)
        return float(total) / self.world
