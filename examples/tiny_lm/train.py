"""Train the embedded language model: `python -m examples.tiny_lm.train`.

A Pythia in small (GPT-NeoX: rotary, parallel residual, untied embeddings, byte-level BPE, no BOS)
on the running interpreter's standard library, so that Strata's main job needs no download.
The run is seeded and resumable: the same command continues from the last checkpoint in `--work`.
It writes `model/` (float16 safetensors and the tokenizer) and the model card from what it measured.
"""

import argparse
import hashlib
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from actors.corpus import Document, StdlibCorpus
from examples.tiny_lm.card import Measured, model_card

HERE = Path(__file__).parent
SEPARATOR = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 256
BATCH_SEQUENCES = 16
DEFAULT_STEPS = 1200
PEAK_LR = 3e-3
WARMUP_STEPS = 100
COSINE_STEPS = 2000
COOLDOWN_STEPS = 400
CHECKPOINT_STEPS = 200


def main() -> None:
    """Train (or continue), then export the model and its card."""
    parser = argparse.ArgumentParser(description="Train the embedded language model.")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="optimizer steps in all")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_lm"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=HERE, help="gets model/ and README.md")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    train, held_out = split_corpus()
    tokenizer = load_tokenizer(args.work, train)
    text = Text(train=tokenize(tokenizer, train), held_out=tokenize(tokenizer, held_out))
    print(f"{len(train)} modules, {len(text.train):,} tokens; held out {len(text.held_out):,}")

    training = Training(args.work, text.train, n_steps=args.steps, device=args.device)
    while training.step < args.steps:
        training.run_to(min(args.steps, training.step + CHECKPOINT_STEPS))
        training.save()
        loss = held_out_loss(training.model, text.held_out[: 64 * CONTEXT + 1])
        print(
            f"step {training.step}: train {training.last_loss:.3f}, held out {loss:.3f} (sample), "
            f"{training.seconds / 60:.1f} min",
            flush=True,
        )
    export(training, text, (len(train), len(held_out)), tokenizer, args.out)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids of all documents, each followed by the separator."""

    train: np.ndarray
    held_out: np.ndarray


def split_corpus() -> tuple[list[Document], list[Document]]:
    """Modules to train on, and the one in 28 that a hash of their name holds out."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in StdlibCorpus().documents():
        (held_out if is_held_out(document.name) else train).append(document)
    return train, held_out


def is_held_out(module: str) -> bool:
    """Whether the model must not see this module in training."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8]) % 28 == 0


def load_tokenizer(work: Path, train: list[Document]) -> Tokenizer:
    """The tokenizer trained on the training modules; kept in `work`, as its training takes time."""
    path = work / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],  # gets id 0, as in Pythia
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in train), trainer)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """One stream of ids: every document, then a separator."""
    separator = [tokenizer.token_to_id(SEPARATOR)]
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return np.array([i for encoding in encodings for i in encoding.ids + separator], np.int64)


class Training:
    """Model, optimizer and place in the data; `save` and the constructor are each other's inverse.

    The batch of a step is a pure function of the step, so a continued run sees the same batches.
    """

    def __init__(self, work: Path, tokens: np.ndarray, n_steps: int, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.model = GPTNeoXForCausalLM(model_config())
        self.step = 0
        self.seconds = 0.0
        self.last_loss = math.nan
        self._checkpoint = work / "checkpoint.pt"
        self._tokens = tokens
        self._n_steps = n_steps
        self._device = device
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=PEAK_LR,
            betas=(0.9, 0.95),
        )
        if self._checkpoint.exists():
            state = torch.load(self._checkpoint, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def run_to(self, step: int) -> None:
        """Train until `step` steps are done."""
        self.model.train()
        started = time.perf_counter()
        while self.step < step:
            ids = self._batch().to(self._device)
            lr = learning_rate(self.step, self._n_steps)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            loss = token_losses(self.model, ids).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.step += 1
            self.last_loss = loss.item()
        self.seconds += time.perf_counter() - started

    def save(self) -> None:
        """Write the checkpoint; a process killed meanwhile leaves the former one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _batch(self) -> Tensor:
        """The contexts of this step: a new cut and a new order of the text in every epoch."""
        per_epoch = len(self._tokens) // CONTEXT // BATCH_SEQUENCES - 1
        epoch, place = divmod(self.step, per_epoch)
        rng = np.random.default_rng([0, epoch])
        offset = int(rng.integers(CONTEXT))
        order = rng.permutation(per_epoch * BATCH_SEQUENCES)
        chosen = order[place * BATCH_SEQUENCES : (place + 1) * BATCH_SEQUENCES]
        starts = offset + CONTEXT * chosen[:, None]
        return torch.from_numpy(self._tokens[starts + np.arange(CONTEXT)])


def model_config() -> GPTNeoXConfig:
    """8 layers of width 128; 2.6 M parameters."""
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up, a slow cosine, and a linear cool-down to zero at the end.

    Before the cool-down it does not depend on `n_steps`: runs of any length begin alike, so a
    checkpoint of one may be continued as another.
    """
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = min(1.0, (step - WARMUP_STEPS) / (COSINE_STEPS - WARMUP_STEPS))
    lr = PEAK_LR * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * progress)))
    return lr * min(1.0, (n_steps - step) / COOLDOWN_STEPS)


def token_losses(model: GPTNeoXForCausalLM, ids: Tensor) -> Tensor:
    """Cross-entropy in nats of every token but the first: (sequences, context - 1), float32."""
    logits = model(ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), -1
    )


@torch.inference_mode()
def held_out_loss(model: GPTNeoXForCausalLM, tokens: np.ndarray) -> float:
    """Mean cross-entropy in nats/token over the full contexts of `tokens`; lower is better."""
    model.eval()
    contexts = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    losses = [token_losses(model, ids.to(model.device)).cpu() for ids in contexts.split(32)]
    return torch.cat(losses).mean().item()


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the tokens' own frequencies, nats/token: the best any context-free model can do."""
    frequency = np.bincount(tokens) / len(tokens)
    frequency = frequency[frequency > 0]
    return float(-(frequency * np.log(frequency)).sum())


def export(
    training: Training, text: Text, n_modules: tuple[int, int], tokenizer: Tokenizer, out: Path
) -> None:
    """Write `out/model` and `out/README.md`; what the card says is measured on the files written."""
    folder = out / "model"
    training.model.half().save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        unk_token=SEPARATOR,
        model_max_length=CONTEXT,
    )
    wrapped.save_pretrained(folder)
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
    measured = Measured(
        n_train_modules=n_modules[0],
        n_held_out_modules=n_modules[1],
        n_train_tokens=len(text.train),
        n_held_out_tokens=len(text.held_out),
        n_steps=training.step,
        step_tokens=BATCH_SEQUENCES * CONTEXT,
        seconds=training.seconds,
        device=str(training.model.device),
        n_parameters=model.num_parameters(),
        n_bytes=(folder / "model.safetensors").stat().st_size,
        held_out_loss=held_out_loss(model, text.held_out),
        unigram_entropy=unigram_entropy(text.held_out),
        sample=sample(model, tokenizer),
        python=platform.python_version(),
    )
    (out / "README.md").write_text(model_card(measured))
    print(f"held out {measured.held_out_loss:.3f}, unigram {measured.unigram_entropy:.3f}: {out}")


@torch.inference_mode()
def sample(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, n_tokens: int = 120) -> str:
    """What the model writes after a prompt, drawn at temperature 0.7 from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = tokenizer.encode('def read_lines(path):\n    """').ids
    for _ in range(n_tokens):
        logits = model(torch.tensor([ids])).logits[0, -1] / 0.7
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return tokenizer.decode(ids)


if __name__ == "__main__":
    main()
