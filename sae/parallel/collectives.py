"""The two collective operations that everything is exchanged by, and how many bytes went into them."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SUM, MIN, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX


class Group:
    """Some ranks that exchange tensors; every one of them calls the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup, payload: Counter[str]) -> None:
        self._group, self._payload = group, payload
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
        """Sum, least or largest of every number over the ranks, in place; the same bits on each."""
        if self.size > 1:
            assert x.is_contiguous()
            self._payload["all_reduce"] += x.nbytes
            dist.all_reduce(x.detach(), op, self._group)
        return x

    def reduced(self, x: Tensor, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
        """`reduce` of a copy without gradient."""
        return self.reduce(x.detach().clone(), op) if self.size > 1 else x.detach()

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows from every rank, in the order of ranks, for rows to every rank.

        Args:
            x: Rows to send: first those for rank 0.
            sent: How many rows go to each rank.
            received: How many come from each.
        """
        self._payload["all_to_all"] += x.nbytes
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), self._group)
        return out

    def gathered(self, number: Tensor) -> Tensor:
        """A whole number of each rank, as (ranks,)."""
        numbers = torch.zeros(self.size, dtype=torch.int64, device=number.device)
        numbers[self.rank] = number
        return self.reduce(numbers)
