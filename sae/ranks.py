"""Who shares an autoencoder: one process, or (`sae.parallel`) several, each with some of its latents."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from jaxtyping import Float, Int
from torch import Tensor

from sae.selection import Selection


class Ranks:
    """One process, which holds every latent and sees every token: nothing has to be exchanged.

    What a step asks of other ranks passes through these methods. Here they return what they are
    given; `sae.parallel.ParallelRanks` exchanges it, and every rank calls them in the same order.
    """

    n_dictionary: int = 1
    """Ranks among which the latents are divided."""

    dictionary_rank: int = 0
    """Which of these this one is."""

    n_batch: int = 1
    """Ranks among which the tokens of a batch are divided, in equal shares."""

    batch_rank: int = 0
    """Which of these this one is."""

    @property
    def number(self) -> int:
        """This one's among all; 0 is the first, which writes what is written once."""
        return self.batch_rank * self.n_dictionary + self.dictionary_rank

    def share(self, n: int) -> range:
        """Which of n consecutive heads, or latents, this rank holds."""
        return range(n)

    def part(self, n_tokens: int) -> slice:
        """Which tokens of a batch this rank is given."""
        return slice(n_tokens)

    def of_first(self, number: int) -> int:
        """What the first rank gives, on all: clocks differ, and so may what is seen of files."""
        return number

    def together(self, x: Tensor | None = None) -> AbstractContextManager[None]:
        """Around what may raise: if it does on one rank, it does on all, so that none is left waiting.

        Args:
            x: Activations that the ranks dividing the latents must have in common.
        """
        return nullcontext()

    def top_k(self, chosen: Selection, k: int) -> Selection:
        """Of this rank's k largest scores of each token, those among the k largest of all ranks."""
        return chosen

    def batch_top_k(self, chosen: Selection, budget: int) -> Selection:
        """Of this rank's `budget` largest scores, those among the `budget` largest of all ranks."""
        return chosen

    def add_up(self, partial: Tensor) -> Tensor:
        """What all latents write, from what this rank's latents write; in place.

        The gradient of a sum is that of each of its parts, so autograd need not know.
        """
        return partial

    def over_latents(self, x: Tensor) -> Tensor:
        """Sum over the ranks that divide the latents: a value, without gradient."""
        return x

    def over_batch(self, x: Tensor) -> Tensor:
        """Sum over the ranks that divide the batch: a value, without gradient."""
        return x

    def batch_mean(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " d_model"]:
        """Mean over all tokens of the batch."""
        return x.mean(0)

    def smallest(self, values: Float[Tensor, " entries"]) -> Float[Tensor, ""] | None:
        """The smallest value that any rank has; None if none has any."""
        return values.min() if len(values) else None

    def last_use(self, tokens_since: Int[Tensor, " latents"]) -> None:
        """For each latent the least count of the ranks that divide the batch; in place."""

    def sum_gradients(self, own: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
        """Gradients of the batch's loss, from those of what this rank computed of it; in place.

        Args:
            own: Of weights that no other rank holds but those which see other tokens.
            shared: Of weights that all ranks hold.
        """


ALONE = Ranks()
"""The one process that trains, or uses, most autoencoders."""
