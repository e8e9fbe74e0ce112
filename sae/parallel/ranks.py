"""The ranks of a process group as a grid: some share the latents, some the tokens of a batch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from sae.parallel.choosing import keep_largest, keep_top_k
from sae.parallel.collectives import MAX, MIN, Group
from sae.ranks import Ranks
from sae.selection import Selection


class RefusedElsewhereError(ValueError):
    """Another rank has refused this, and it is that one's error which says why."""


class ParallelRanks(Ranks):
    """All ranks of torch.distributed's process group; rank b*n_dictionary + a holds piece a.

    Ranks of one b are given the same tokens and share the latents; ranks of one a hold the same
    latents and share the batch, each with as many tokens.
    """

    def __init__(self, n_dictionary: int | None = None) -> None:
        """Made by every rank, once the process group is there.

        Args:
            n_dictionary: Ranks that share the latents; None: all. The batch is divided among as
                many such groups as there are.

        Raises:
            ValueError: If there is no process group, or its ranks can't be arranged so.
        """
        if not dist.is_initialized():
            raise ValueError(
                "there is no process group to share an autoencoder; torch.distributed makes one; "
                "call torch.distributed.init_process_group first"
            )
        world = dist.get_world_size()
        self.n_dictionary = world if n_dictionary is None else n_dictionary
        if self.n_dictionary < 1 or world % self.n_dictionary:
            raise ValueError(
                f"{world} ranks can't be divided into groups of n_dictionary={n_dictionary}; it "
                "divides their number; choose another, or start more ranks"
            )
        self.n_batch = world // self.n_dictionary
        self.device = torch.device("cpu")
        if dist.get_backend() == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.payload: Counter[str] = Counter()
        """Bytes that this rank handed to each kind of collective operation so far."""
        grid = init_device_mesh(
            self.device.type,
            (self.n_batch, self.n_dictionary),
            mesh_dim_names=("batch", "dictionary"),
        )
        world_group = dist.group.WORLD
        assert world_group is not None
        self._all = Group(world_group, self.payload)
        self._batch = Group(grid.get_group("batch"), self.payload)
        self._dictionary = Group(grid.get_group("dictionary"), self.payload)
        self.batch_rank, self.dictionary_rank = self._batch.rank, self._dictionary.rank

    def share(self, n: int) -> range:
        """Which of n heads or latents this rank holds; pieces differ by one at most."""
        if n < self.n_dictionary:
            raise ValueError(
                f"{n} heads, or latents, can't be shared by {self.n_dictionary} ranks; each holds at "
                "least one; take fewer ranks, or a wider dictionary"
            )
        rank, size = self.dictionary_rank, self.n_dictionary
        return range(n * rank // size, n * (rank + 1) // size)

    def part(self, n_tokens: int) -> slice:
        """Which tokens of a batch this rank is given: as many as every other, or else all of them.

        What can't be divided evenly, as the last batch of an epoch, all ranks are given whole. Loss,
        gradients and selections are then of each token n_batch times, which is the same step; but
        `Firing` counts its tokens as often.
        """
        if n_tokens % self.n_batch:
            return slice(n_tokens)
        size = n_tokens // self.n_batch
        return slice(self.batch_rank * size, (self.batch_rank + 1) * size)

    def of_first(self, number: int) -> int:
        """What the first rank gives, on all."""
        given = torch.zeros((), dtype=torch.int64, device=self.device)
        if self.number == 0:
            given.fill_(number)
        return int(self._all.reduce(given))

    @contextmanager
    def together(self, x: Tensor | None = None) -> Iterator[None]:
        """As for one process; whoever did not raise itself raises `RefusedElsewhereError`."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is raised below
            error = raised
        # Of the largest of x and of -x over the ranks one learns whether all have the same.
        same = torch.zeros(3 + 2 * self.n_batch, dtype=torch.float64, device=self.device)
        same[3:] = -torch.inf
        same[0] = error is not None
        if x is not None and error is None:
            same[1], same[2] = len(x), -len(x)
            total = x.detach().sum().double().nan_to_num()
            same[3:].view(2, -1)[:, self.batch_rank] = torch.stack([total, -total])
        self._all.reduce(same, MAX)
        if error is not None:
            raise error
        failed, most, least, *sums = same.tolist()
        if failed:
            raise RefusedElsewhereError("another rank has refused this; its own message says why")
        self._refuse_unlike(most, -least, sums)

    def _refuse_unlike(self, most: float, least: float, sums: list[float]) -> None:
        if most != least:
            raise ValueError(
                f"ranks were given {least:.0f} to {most:.0f} tokens; each is given as many; divide "
                f"the batch into {self.n_batch} equal shares"
            )
        largest, negated = sums[: self.n_batch], sums[self.n_batch :]
        if any(a != -b for a, b in zip(largest, negated, strict=True) if a > -torch.inf):
            raise ValueError(
                f"the {self.n_dictionary} ranks that share the latents were given different tokens; "
                "they see the same; give each the batch that its batch_rank stands for"
            )

    def top_k(self, chosen: Selection, k: int) -> Selection:
        """Of this rank's k largest scores of each token, those among the k largest of all ranks."""
        return keep_top_k(chosen, k, self._dictionary) if self.n_dictionary > 1 else chosen

    def batch_top_k(self, chosen: Selection, budget: int) -> Selection:
        """Of this rank's `budget` largest scores, those among the `budget` largest of all ranks."""
        return keep_largest(chosen, budget, self._all)

    def add_up(self, partial: Tensor) -> Tensor:
        """What all latents write, from what this rank's latents write; in place."""
        return self._dictionary.reduce(partial)

    def over_latents(self, x: Tensor) -> Tensor:
        """Sum over the ranks that divide the latents: a value, without gradient."""
        return self._dictionary.reduced(x)

    def over_batch(self, x: Tensor) -> Tensor:
        """Sum over the ranks that divide the batch: a value, without gradient."""
        return self._batch.reduced(x)

    def batch_mean(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " d_model"]:
        """Mean over all tokens of the batch."""
        return self._batch.reduced(x.mean(0)) / self.n_batch

    def smallest(self, values: Float[Tensor, " entries"]) -> Float[Tensor, ""] | None:
        """The smallest value that any rank has; None if none has any."""
        mine = values.detach().min() if len(values) else values.new_tensor(torch.inf)
        least = self._all.reduced(mine, MIN)
        return least if least.isfinite() else None

    def last_use(self, tokens_since: Int[Tensor, " latents"]) -> None:
        """For each latent the least count of the ranks that divide the batch; in place."""
        self._batch.reduce(tokens_since, MIN)

    def sum_gradients(self, own: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
        """Gradients of the batch's loss, from those of what this rank computed of it; in place."""
        for gradient in own:
            self._batch.reduce(gradient)
        for gradient in shared:
            self._all.reduce(gradient)
