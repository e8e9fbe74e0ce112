"""Quality on activations of small language models: the papers' claims, put to the test.

Every autoencoder of a pilot sees the same batches in the same order; all are measured on tokens of
other documents, in the model's units.
"""

from typing import Any, Literal

from benchmarks.activations import Pilot, shuffled
from benchmarks.fitting import Measured, fitted, measured
from sae import KronShape, SaeConfig, SparseAutoencoder

D_SAE, BATCH = 1024, 1024
KS = (8, 16, 32)
SCALINGS: tuple[Literal["layer_scale", "token_standardize"], ...] = (
    "layer_scale",
    "token_standardize",
)
SHAPES = ((2, 4), (4, 4), (4, 8))
LR = 4e-3
DEAD_AFTER = 50_000
_MAND_SHAPE = KronShape(h=64, m=4, n=4)


class PilotTables:
    """The tables of one pilot."""

    def __init__(self, pilot: Pilot, n_tokens: int, n_steps: int) -> None:
        self._name, self._n_steps = pilot.name, n_steps
        self._train, self._held_out = pilot.activations(n_tokens)
        # Of the training rows, as many as are held out: what the threshold was learnt on.
        self._seen = next(shuffled(self._train, len(self._held_out), seed=1))

    def _fit(self, k: int, **options: Any) -> SparseAutoencoder:
        cfg = SaeConfig(d_model=self._train.shape[1], d_sae=D_SAE, k=k, **options)
        batches = shuffled(self._train, BATCH, seed=0)
        return fitted(cfg, batches, self._n_steps, lr=LR, dead_after_tokens=DEAD_AFTER)

    def selections(self) -> list[dict[str, Any]]:
        """TopK against BatchTopK at equal L0, and BatchTopK's threshold against its batch.

        The threshold is compared on rows it was learnt on (`seen_`) and on held-out documents,
        where it also shows that those use more latents, or fewer, than the text trained on.
        """
        table = []
        for scaling in SCALINGS:
            for k in KS:
                top = measured(self._fit(k, scaling=scaling), self._held_out)
                batch = self._fit(k, scaling=scaling, selection="batch_topk")
                by_batch = measured(batch, self._held_out, by_batch=True)
                by_threshold = measured(batch, self._held_out)
                seen_by_batch = measured(batch, self._seen, by_batch=True)
                seen_by_threshold = measured(batch, self._seen)
                row = {
                    "pilot": self._name,
                    "scaling": scaling,
                    "k": k,
                    "fvu_topk": top.fvu,
                    "l0_topk": top.l0,
                    "fvu_batch_topk": by_batch.fvu,
                    "l0_batch_topk": by_batch.l0,
                    "fvu_threshold": by_threshold.fvu,
                    "l0_threshold": by_threshold.l0,
                    "seen_fvu_batch_topk": seen_by_batch.fvu,
                    "seen_l0_batch_topk": seen_by_batch.l0,
                    "seen_fvu_threshold": seen_by_threshold.fvu,
                    "seen_l0_threshold": seen_by_threshold.l0,
                    "dead_topk": top.dead_fraction,
                    "dead_batch_topk": by_batch.dead_fraction,
                }
                table.append(row)
                _print(row)
        return table

    def encoders(self, k: int) -> list[dict[str, Any]]:
        """Dense against Kronecker shapes at equal d_sae and equal tokens."""
        table = []
        for name, encoder in {
            "dense": "dense",
            **{f"Kron {m, n}": KronShape(h=D_SAE // (m * n), m=m, n=n) for m, n in SHAPES},
        }.items():
            sae = self._fit(k, encoder=encoder)
            found = measured(sae, self._held_out)
            row = {
                "pilot": self._name,
                "encoder": name,
                "k": k,
                "fvu": found.fvu,
                "dead": found.dead_fraction,
                "parameters": sae.cfg.n_parameters,
                "encoder_parameters": sae.cfg.n_encoder_parameters,
            }
            table.append(row)
            _print(row)
        return table

    def activations(self, k: int) -> dict[str, Any]:
        """MAND against the product of the factors."""
        mand = self._measured_kron(k, _MAND_SHAPE)
        product = self._measured_kron(
            k,
            KronShape(h=_MAND_SHAPE.h, m=_MAND_SHAPE.m, n=_MAND_SHAPE.n, activation="relu_product"),
        )
        row = {
            "pilot": self._name,
            "k": k,
            "fvu_mand": mand.fvu,
            "fvu_relu_product": product.fvu,
        }
        _print(row)
        return row

    def _measured_kron(self, k: int, shape: KronShape) -> Measured:
        return measured(self._fit(k, encoder=shape), self._held_out)


def _print(row: dict[str, Any]) -> None:
    figures = [f"{key} {v:.4f}" if isinstance(v, float) else str(v) for key, v in row.items()]
    print("  " + "  ".join(figures), flush=True)
