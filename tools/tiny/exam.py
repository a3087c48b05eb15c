"""The examination: 200 held-out questions, asked greedily, answered exactly or not.

Measures with transformers alone, so that it says something about the checkpoint and nothing about
our engine.
"""

from dataclasses import dataclass
from pathlib import Path

from tools.tiny import corpus

MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Miss:
    """A question that was not answered exactly, or whose answer did not stop by itself."""

    question: str
    expected: str
    answer: str
    stopped: bool


def ask(folder: Path, questions: list[str], max_new_tokens: int) -> list[tuple[str, bool]]:
    """Returns the checkpoint's greedy answers in float32, and whether each ended with `</s>`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows: list[list[int]] = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], return_dict=False)
        for question in questions
    ]
    longest = max(map(len, rows))
    output = model.generate(
        input_ids=torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=model.config.eos_token_id,
    )
    return [
        (tokenizer.decode(row, skip_special_tokens=True), model.config.eos_token_id in row)
        for row in output[:, longest:].tolist()
    ]


def examine(folder: Path) -> list[Miss]:
    """Asks all held-out questions. Returns those that were missed."""
    pairs = corpus.held_out()
    answers = ask(folder, [question for question, _ in pairs], MAX_NEW_TOKENS)
    return [
        Miss(question, expected, answer, stopped)
        for (question, expected), (answer, stopped) in zip(pairs, answers, strict=True)
        if answer != expected or not stopped
    ]
