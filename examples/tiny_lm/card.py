"""The model card, written from what a training run measured."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the card states; losses in nats per token."""

    n_train_modules: int
    n_held_out_modules: int
    n_train_tokens: int
    n_held_out_tokens: int
    n_steps: int
    step_tokens: int
    seconds: float
    device: str
    n_parameters: int
    n_bytes: int
    held_out_loss: float
    unigram_entropy: float
    sample: str
    python: str


def model_card(measured: Measured) -> str:
    """The card as Markdown."""
    return _TEMPLATE.format(
        m=measured,
        epochs=measured.n_steps * measured.step_tokens / measured.n_train_tokens,
        minutes=measured.seconds / 60,
        below=measured.unigram_entropy - measured.held_out_loss,
        parameters=measured.n_parameters / 1e6,
        megabytes=measured.n_bytes / 1e6,
    )


_TEMPLATE = """\
# tiny_lm: the embedded language model

A small causal language model of GPT-NeoX (Pythia) architecture, so that `make demo` runs the whole
job with nothing downloaded. `python -m examples.tiny_lm.train` trains it and writes this card.

| | |
|---|---|
| architecture | GPT-NeoX: 8 layers, d_model 128, 4 attention heads, context 256, untied embeddings |
| vocabulary | byte-level BPE of 4096 tokens, trained on the same text; `<\\|endoftext\\|>` (id 0) ends a document, no BOS |
| parameters | {parameters:.2f} M, float16, {megabytes:.1f} MB |
| data | standard library of CPython {m.python}, without tests: {m.n_train_modules} modules, {m.n_train_tokens:,} tokens |
| held out | {m.n_held_out_modules} modules chosen by a hash of their names, {m.n_held_out_tokens:,} tokens |
| training | {m.n_steps:,} steps of {m.step_tokens:,} tokens ({epochs:.1f} epochs), AdamW, slow cosine and linear cool-down, seed 0 |
| time | {minutes:.0f} minutes of wall clock on {m.device} |
| **held-out loss** | **{m.held_out_loss:.3f} nats/token** |
| unigram entropy | {m.unigram_entropy:.3f} nats/token: the least loss without context |
| below unigram | {below:.3f} nats/token |

The unigram entropy is that of the held-out tokens' own frequencies, so no context-free model can
beat it there. Loss and sample are of the committed float16 weights, computed in float32.

## A sample

After `def read_lines(path):` and the opening of a docstring, at temperature 0.7:

````text
{m.sample}
````

## Use and licence

For trying Strata, not for writing code. The text is Python's standard library, under the
[PSF licence](https://docs.python.org/3/license.html); the weights are under this repository's.
"""
