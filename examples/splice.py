"""Which latent matters most to what a model predicts, and what happens without it.

    python -m examples.splice runs/demo

Takes a finished run, splices its last group's best autoencoder into the model, ranks latents by
attribution (activation times gradient, summed over tokens), ablates the one of most effect, and
compares what was foretold with what happened. Offline, in seconds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from actors.splice import splice, used_rows
from sae import checkpoint
from sae.interventions import ablate
from storage.hygiene import RowFilter
from storage.tokens import TokenStore

N_SEQUENCES, N_SHOWN = 8, 5


def main(run: Path) -> None:
    """Run the experiment on a run directory, and print what came out."""
    group = json.loads((run / "summary.json").read_text())["groups"][-1]
    trial, layer = group["best"]["trial"], group["layers"][0]
    sae, _ = checkpoint.load(run / "trials" / trial / "sae")
    sae.requires_grad_(False)
    name = yaml.safe_load((run / "config.yaml").read_text())["model"]["name"]
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval().requires_grad_(False)
    tokens = TokenStore.open(run / "tokens.zarr")
    n_sequences = min(N_SEQUENCES, tokens.n_sequences("validation"))
    ids = tokens.ids("validation", np.arange(n_sequences))
    # Replace those rows alone that autoencoders are trained on: no BOS, no massive norms.
    row_filter = RowFilter.from_json(json.loads((run / "groups.json").read_text())["row_filter"])
    rows = used_rows(ids, row_filter, tokens.first_position)
    ids = torch.from_numpy(ids)

    with torch.no_grad():
        clean = next_token_loss(model, ids)
        with splice(model, {layer: sae}, rows=rows):
            spliced = next_token_loss(model, ids)
    print(f"{trial} on layer {layer}")
    print(f"loss of the model           {clean.mean():.4f} nats per token")
    print(f"with reconstructions        {spliced.mean():.4f}")

    # With its error term the model computes the same, and gradients pass through the latents.
    with splice(model, {layer: sae}, error_term=True, rows=rows) as seen:
        loss = next_token_loss(model, ids)
        loss.mean().backward()
    print(f"with the error term as well {loss.mean():.4f}")
    latents = seen.latents[layer]
    gradient = latents.values.grad
    assert gradient is not None
    foretold = torch.zeros(latents.d_sae).index_add_(
        0, latents.indices, -latents.values.detach() * gradient
    )
    latent = int(foretold.argmax())

    edits = {layer: lambda z: ablate(z, [latent])}
    with torch.no_grad(), splice(model, {layer: sae}, error_term=True, edits=edits, rows=rows):
        without = next_token_loss(model, ids)
    harm = without - clean
    print(
        f"latent {latent} ablated: {harm.mean():+.5f} nats per token ({foretold[latent]:+.5f} foretold)"
    )

    print("predictions that suffer most:")
    tokenizer = AutoTokenizer.from_pretrained(name)
    for place in harm.flatten().topk(N_SHOWN).indices.tolist():
        sequence, position = divmod(place, harm.shape[1])
        before = tokenizer.decode(ids[sequence, max(0, position - 9) : position + 1])
        predicted = tokenizer.decode(ids[sequence, position + 1])
        print(f"  {harm[sequence, position]:+.3f}  ...{before!r} -> {predicted!r}")


def next_token_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token given those before it: (sequences, context - 1), in nats."""
    logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Which latent matters most, and what happens without it."
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    folder = parser.parse_args().run
    if not (folder / "summary.json").is_file():
        parser.error(
            f"{folder} holds no finished run; finish one with `strata demo`, and name its run_dir"
        )
    main(folder)
