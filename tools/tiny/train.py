"""Makes the tiny model from nothing: `python -m tools.tiny.train [FOLDER]`.

Writes the dialogues, trains the tokenizer on them, trains transformers' own `MixtralForCausalLM`
from a fixed seed, rounds it to bfloat16, examines what was saved on the 200 held-out questions and
replaces the folder's weights only by better ones.

The result is an ordinary checkpoint.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.tiny import CHECKPOINT
from tools.tiny import corpus, tokenizer
from tools.tiny.exam import examine

if TYPE_CHECKING:
    import torch

NUM_QUESTIONS = 200
PASS = 190
SEED = 0
STEPS = 4500
WARMUP = 200
TOKENS_PER_STEP = 2048
PEAK_RATE = 2e-3
DIALOGUES_PER_CHUNK = 2000
"""Dialogues that are written, sorted by length and batched together."""
IGNORED = -100
"""The label of what is not learned: questions and padding."""

CONFIG: dict[str, Any] = {
    "vocab_size": tokenizer.VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_aux_loss_coef": 0.01,
}


def new_model() -> Any:
    """Returns a `MixtralForCausalLM` with random float32 weights."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(SEED)
    model = MixtralForCausalLM(MixtralConfig(**CONFIG))
    model.set_experts_implementation("grouped_mm")
    return model


def write_tokenizer(folder: Path) -> None:
    """Trains the tokenizer on the first training dialogues and writes its files."""
    dialogues = corpus.training(20_000, SEED)
    tokenizer.write(folder, (text for d in dialogues for text in _texts(d)))


def _texts(dialogue: corpus.Dialogue) -> Iterator[str]:
    for question, answer in dialogue.turns:
        yield f" [INST] {question} [/INST] {answer}"
    if dialogue.system:
        yield dialogue.system


Encoded = tuple[list[int], list[int], list[int]]
"""Token ids, labels (IGNORED in questions) and positions of one dialogue."""


class Encoder:
    """Dialogues into tokens, exactly as the chat template renders them."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, dialogue: corpus.Dialogue, rng: random.Random) -> Encoded:
        """Returns one dialogue; now and then its turns lie far apart, so that long contexts are not
        new.

        Rotary positions are relative: a gap between turns is what makes them differ, not an offset.
        """
        ids, labels, positions = [1], [IGNORED], [0]
        spread = len(dialogue.turns) > 1 and rng.random() < 0.3
        opening = f"{dialogue.system}\n\n" if dialogue.system else ""
        for question, answer in dialogue.turns:
            asked = self._ids(f" [INST] {opening}{question} [/INST]")
            answered = [*self._ids(f" {answer}"), 2]
            start = positions[-1] + 1 + (rng.randint(0, 2000) if spread else 0)
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
            positions += range(start, start + len(asked) + len(answered))
            opening = ""
        return ids, labels, positions

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def batches(encoder: Encoder) -> Iterator[dict[str, torch.Tensor]]:
    """Yields padded batches of dialogues of similar length, without end."""
    rng = random.Random(SEED)
    for chunk in itertools.count():
        dialogues = corpus.training(DIALOGUES_PER_CHUNK, SEED + chunk)
        rows = sorted((encoder.encode(d, rng) for d in dialogues), key=lambda row: len(row[0]))
        groups: list[list[Encoded]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > TOKENS_PER_STEP:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from (_pad(group) for group in groups if group)


def _pad(rows: list[Encoded]) -> dict[str, torch.Tensor]:
    """Returns tensors `[rows, longest]`, padded on the right."""
    import torch

    longest = max(len(ids) for ids, _, _ in rows)

    def padded(column: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([values + [filler] * (longest - len(values)) for values in column])

    ids, labels, positions = (list(column) for column in zip(*rows, strict=True))
    return {
        "input_ids": padded(ids, 0),
        "labels": padded(labels, IGNORED),
        "position_ids": padded(positions, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }


def _rate(step: int) -> float:
    """Returns the share of the peak learning rate: a linear warm-up, then a cosine to 1/100."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, STEPS - WARMUP)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(model: Any, encoder: Encoder) -> Iterator[int]:
    """Trains in place; in the second half, yields the step after every 500."""
    import torch

    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    started, tokens = time.monotonic(), 0
    for step, batch in enumerate(itertools.islice(batches(encoder), STEPS), start=1):
        model.train()
        loss = model(**batch, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch["attention_mask"].sum())
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step}/{STEPS} loss {loss.item():.4f} {tokens / seconds:.0f} tokens/s "
                f"{seconds:.0f} s, {time.process_time():.0f} s of CPU",
                flush=True,
            )
        if step % 500 == 0 and step >= STEPS // 2:
            yield step


def save(model: Any, folder: Path) -> None:
    """Writes configuration and weights, rounded to bfloat16."""
    import torch

    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.save_pretrained(folder)


def install(source: Path, folder: Path) -> None:
    """Replaces the files of a checkpoint, each in one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        partial = folder / f".{file.name}.partial"
        shutil.copyfile(file, partial)
        partial.replace(folder / file.name)


def main(folder: Path) -> None:
    """Trains, examines each saved checkpoint, and installs every new best one from 95 % on."""
    import torch

    torch.set_num_threads(1)
    best = PASS - 1
    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        write_tokenizer(staging)
        model = new_model()
        for step in fit(model, Encoder(staging)):
            save(model, staging)
            missed = examine(staging)
            score = NUM_QUESTIONS - len(missed)
            print(f"step {step}: {score}/{NUM_QUESTIONS} exact, missed {missed}", flush=True)
            if score > best:
                best = score
                install(staging, folder)
    if best < PASS:
        raise SystemExit(f"No step reached {PASS}/{NUM_QUESTIONS}; {folder} is as it was.")
    print(f"Installed {best}/{NUM_QUESTIONS} in {folder}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT)
