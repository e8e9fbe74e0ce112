"""One rank of the parallel benchmark: `benchmarks.our_steps` with an autoencoder that ranks share, over gloo."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks import our_steps
from benchmarks.worker import Held, Step, serve
from sae.parallel import ParallelRanks


def make(arguments: dict[str, Any], first: Tensor) -> tuple[Step, Held]:
    """A fit shared by as many ranks as are asked for; one of one rank is an ordinary one."""
    if arguments["ranks"] == 1:
        step, held = our_steps.make(arguments, first)
        return step, lambda: {**held(), "payload": 0}
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{arguments['meeting']}",
            rank=arguments["rank"],
            world_size=arguments["ranks"],
        )
    ranks = ParallelRanks()
    step, held = our_steps.make(arguments, first, ranks)
    return step, lambda: {**held(), "payload": ranks.payload.total()}


if __name__ == "__main__":
    serve(make, [], our_steps.smallest)
