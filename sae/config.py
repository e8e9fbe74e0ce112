"""The shape of a sparse autoencoder: what can't be changed after it was trained."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KronShape:
    """Shape of a Kronecker-factored encoder (KronSAE, arXiv 2505.22255).

    Raises:
        ValueError: If a size is below 1.
    """

    h: int
    """Independent heads; latents of different heads share no factor."""

    m: int
    """Rows of the composition base P of each head."""

    n: int
    """Rows of the composition extension Q of each head."""

    activation: Literal["mand", "relu_product"] = "mand"
    """`mand`: sqrt(u v) where both are positive. `relu_product`: u v there, the paper's ablation."""

    def __post_init__(self) -> None:
        if min(self.h, self.m, self.n) < 1:
            raise ValueError(
                f"the Kronecker shape is (h, m, n) = {self.h, self.m, self.n}; every size is a "
                "whole number from 1; the published starting point is m=2, n=4"
            )
        if self.activation not in ("mand", "relu_product"):
            raise ValueError(f"activation={self.activation!r}; it is 'mand' or 'relu_product'")

    @property
    def d_sae(self) -> int:
        """Number of latents, h * m * n."""
        return self.h * self.m * self.n

    @property
    def head_width(self) -> int:
        """Latents of one head, m * n."""
        return self.m * self.n

    @property
    def n_rows(self) -> int:
        """Rows of the encoder's weight, h * (m + n)."""
        return self.h * (self.m + self.n)


@dataclass(frozen=True, kw_only=True)
class SaeConfig:
    """Architecture of a sparse autoencoder: encoder x selection x prefixes x input scaling.

    Raises:
        ValueError: If the sizes contradict each other.
    """

    d_model: int
    """Width of the activations."""

    d_sae: int
    """Number of latents."""

    k: int
    """Latents kept per token (on average over the batch with `batch_topk`)."""

    encoder: Literal["dense"] | KronShape = "dense"
    """`dense`: a weight row per latent. A `KronShape`: products of two thin projections."""

    selection: Literal["topk", "batch_topk", "jumprelu"] = "topk"
    """`topk`: the k largest of each token. `batch_topk`: the k * tokens largest of the batch.
    `jumprelu`: a learnt threshold per latent; L0 follows from the fit's `sparsity_coefficient`
    and k has no part in it."""

    prefixes: tuple[int, ...] = ()
    """Matryoshka: nested dictionary sizes, rising, the last one d_sae. Empty: d_sae alone."""

    scaling: Literal["layer_scale", "token_standardize"] = "layer_scale"
    """`layer_scale`: a factor per layer. `token_standardize`: each token to mean 0, deviation 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        sizes = (self.d_model, self.d_sae, self.k)
        if not all(isinstance(size, int) for size in sizes) or min(sizes) < 1:
            raise ValueError(
                f"d_model={self.d_model!r}, d_sae={self.d_sae!r}, k={self.k!r}: each is a whole number "
                "from 1; correct the one below"
            )
        if self.k > self.d_sae:
            raise ValueError(
                f"k={self.k} exceeds d_sae={self.d_sae}; at most every latent can be kept; "
                "lower k or widen the dictionary"
            )
        if isinstance(self.encoder, KronShape):
            shape = self.encoder
            if shape.d_sae != self.d_sae:
                raise ValueError(
                    f"h*m*n = {shape.h}*{shape.m}*{shape.n} = {shape.d_sae}, but d_sae="
                    f"{self.d_sae}; a Kronecker encoder has exactly h*m*n latents; set d_sae="
                    f"{shape.d_sae} or choose h = d_sae / (m*n)"
                )
        elif self.encoder != "dense":
            raise ValueError(f"encoder={self.encoder!r}; it is 'dense' or a KronShape(h, m, n)")
        self._check_choice("selection", self.selection, ("topk", "batch_topk", "jumprelu"))
        self._check_choice("scaling", self.scaling, ("layer_scale", "token_standardize"))
        self._check_prefixes()

    def _check_choice(self, name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; it is one of {', '.join(allowed)}; choose one")

    def _check_prefixes(self) -> None:
        if not self.prefixes:
            return
        if self.prefixes[-1] != self.d_sae:
            raise ValueError(
                f"prefixes={self.prefixes} end at {self.prefixes[-1]}, but d_sae={self.d_sae}; "
                "the last prefix is the whole dictionary; append d_sae or change it"
            )
        if list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[0] < 1:
            raise ValueError(
                f"prefixes={self.prefixes} do not rise; nested sizes are strictly increasing "
                "from 1; sort them and drop repeats"
            )
        if isinstance(self.encoder, KronShape):
            width = self.encoder.head_width
            cut = [p for p in self.prefixes if p % width]
            if cut:
                raise ValueError(
                    f"prefixes {cut} cut a head of m*n={width} latents; with a Kronecker encoder a "
                    f"prefix holds whole heads; round them to multiples of {width}"
                )

    @property
    def n_encoder_parameters(self) -> int:
        """Weights and biases of the encoder: d_sae or h(m+n) rows of d_model + 1."""
        rows = self.encoder.n_rows if isinstance(self.encoder, KronShape) else self.d_sae
        return rows * (self.d_model + 1)

    @property
    def n_parameters(self) -> int:
        """Weights and biases of encoder and decoder, and JumpReLU's thresholds."""
        thresholds = self.d_sae if self.selection == "jumprelu" else 0
        return self.n_encoder_parameters + self.d_sae * self.d_model + self.d_model + thresholds

    @property
    def encoder_flops_per_token(self) -> int:
        """Multiply-adds the encoder's definition asks for, eq 7 of arXiv 2505.22255.

        d_model * d_sae for `dense`; d_model * h(m+n) + h*m*n for a Kronecker encoder, although
        head pruning evaluates only a few of the h*m*n products.
        """
        if isinstance(self.encoder, KronShape):
            return self.d_model * self.encoder.n_rows + self.d_sae
        return self.d_model * self.d_sae

    @property
    def training_flops_per_token(self) -> int:
        """Floating-point operations of a training step, a multiply-add being two, by its definition.

        The encoder on every token; then, for the k latents in use: decoding, the gradients of their
        values, of their decoder rows and of the encoder's rows that they come from (one of a dense
        encoder, two of a Kronecker one). AuxK, the optimiser and the choice of the k come on top.
        """
        encoder_rows = 2 if isinstance(self.encoder, KronShape) else 1
        of_latents = (3 + encoder_rows) * self.k * self.d_model
        return 2 * (self.encoder_flops_per_token + of_latents)
