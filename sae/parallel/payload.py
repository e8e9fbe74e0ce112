"""How many bytes a rank hands to the collective operations of a training step."""

from collections import Counter

from sae.config import SaeConfig
from sae.losses import auxk_size
from sae.parallel.choosing import DIGIT_BITS


def step_payload(
    cfg: SaeConfig,
    n_tokens: int,
    *,
    n_dictionary: int,
    n_batch: int = 1,
    n_dead: int = 0,
    itemsize: int = 4,
) -> Counter[str]:
    """Bytes of one step, by kind of operation: the formula of docs/dictionary_parallel.md.

    It leaves out a dozen of single numbers, and takes the latents to be shared evenly. Of an
    `all_reduce` of b bytes among r ranks each sends 2 (r - 1) / r * b bytes over the network, and
    receives as many; of an `all_to_all`, (r - 1) / r * b.

    Args:
        cfg: Architecture, of the whole.
        n_tokens: Tokens that each rank is given.
        n_dictionary: Ranks that share the latents.
        n_batch: Ranks that share the batch.
        n_dead: Dead latents that AuxK trains, of the whole.
        itemsize: Bytes of a weight; 4 or 8.
    """
    payload: Counter[str] = Counter()
    row, k_aux = cfg.d_model * itemsize, min(auxk_size(cfg.d_model), n_dead)
    if n_dictionary > 1:
        # What the latents write, ring by ring, and what the dead ones write for AuxK.
        n_matrices = max(1, len(cfg.prefixes)) + (k_aux > 0)
        payload["all_reduce"] += n_matrices * n_tokens * row
        # Candidates of each token, and how many of them stay.
        candidates = [k_aux] * (k_aux > 0) + [cfg.k] * (cfg.selection == "topk")
        payload["all_to_all"] += sum(n_tokens * (k * itemsize + 4) for k in candidates)
    if cfg.selection == "batch_topk":
        n_histograms = -(-(8 * itemsize - 1) // DIGIT_BITS)
        payload["all_reduce"] += (n_histograms << DIGIT_BITS) * 8 + 8 * n_dictionary * n_batch
    payload["all_reduce"] += row  # of b_dec's gradient
    if n_batch > 1:
        n_held = cfg.d_sae // n_dictionary
        held = (cfg.n_parameters - cfg.d_model) // n_dictionary
        # Gradients of what is held and of its rows' lengths, when a latent was last in use, means.
        payload["all_reduce"] += (held + n_held) * itemsize + 8 * n_held
        payload["all_reduce"] += (2 + (k_aux > 0)) * row
    return payload
