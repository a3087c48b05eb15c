"""Measures text processing: loading the tokenizer, rendering chats, detokenizing.

    python -m benchmarks.text --save benchmarks/results/text-cpu.json

Runs with the tiny model's tokenizer (768 entries) and with Mixtral's own (32,000), one process, no
server. transformers' tokenizer for the same files stands beside ours. Figures are the best of
several runs, because the machine may be shared.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import new_parser, publish, say
from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.text import TextStream
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.tiny import CHECKPOINT
from tools import mixtral_tokenizer

ENGLISH = "The server reads the weights, and then it answers 32 questions at once. "
CODE = "def add(left, right):\n    return left + right\n\n\n"
RARE = "𓂀𓃠𓆣 "
STOPS = ("</answer>", "\n\nQuestion:", "STOP", "###")
CHATS = {"short": ENGLISH, "8,000 characters": (ENGLISH * 120)[:8000]}
LOADS = {
    "ours": "from serve_app.protocol.tokenizer import Tokenizer; Tokenizer({folder!r})",
    "transformers": "from transformers import PreTrainedTokenizerFast as Tokenizer; "
    "Tokenizer.from_pretrained({folder!r}).apply_chat_template("
    "[dict(role='user', content='Hello')])",
}


def load_seconds(folder: Path, repeats: int) -> dict[str, float]:
    """Returns the processor seconds of a process that loads the tokenizer and renders a chat."""
    found: dict[str, list[float]] = {name: [] for name in LOADS}
    for _ in range(repeats):
        for name, program in LOADS.items():
            timed = f"{program.format(folder=str(folder))}; import time; print(time.process_time())"
            command = [sys.executable, "-W", "ignore", "-c", timed]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(float(done.stdout.split()[-1]))
    return {name: round(statistics.median(seconds), 2) for name, seconds in found.items()}


def best_us(work: Callable[[], object], repeats: int) -> float:
    """Returns the microseconds of the fastest run of `work`."""
    fastest = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest * 1e6


def us_per_token(
    tokenizer: Tokenizer, text: str, stops: Sequence[str], num_tokens: int, repeats: int
) -> float:
    """Returns the microseconds per token to detokenize an answer with this text token by token."""
    ids = tokenizer.encode(text * num_tokens, add_special_tokens=False)[:num_tokens]

    def answer() -> None:
        stream = TextStream(Detokenizer(tokenizer.backend), stops)
        for token_id in ids:
            stream.push((token_id,))

    return round(best_us(answer, repeats) / num_tokens, 2)


def chat_us(folder: Path, tokenizer: Tokenizer, repeats: int) -> dict[str, dict[str, int]]:
    """Returns the microseconds to turn a conversation into ids, by our tokenizer and by
    transformers'."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    found = {}
    for name, text in CHATS.items():
        # A control token in the text, so that it has to be marked.
        chat = [{"role": "user", "content": f"{text}</s>"}]
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda chat=chat: tokenizer.render(chat),  # type: ignore[misc]
            "transformers": lambda chat=chat: reference.apply_chat_template(chat),  # type: ignore[misc]
        }
        found[name] = {way: round(best_us(work, repeats)) for way, work in ways.items()}
    return found


def measure(folder: Path, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Returns all figures of the tokenizer in `folder`."""
    tokenizer = Tokenizer(folder)
    texts = {"English": ENGLISH, "code": CODE, "characters of four byte tokens": RARE}
    return {
        "load_cpu_seconds": load_seconds(folder, max(1, repeats // 4)),
        "chat_us": chat_us(folder, tokenizer, repeats),
        "us_per_token": {
            name: {
                "plain": us_per_token(tokenizer, text, (), num_tokens, repeats),
                "four stop strings": us_per_token(tokenizer, text, STOPS, num_tokens, repeats),
            }
            for name, text in texts.items()
        },
    }


def main() -> None:
    """Measures both tokenizers."""
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"tiny": CHECKPOINT, "mixtral": mixtral_tokenizer.write(Path(scratch))}
        for name, folder in folders.items():
            figures[name] = measure(folder, options.tokens, options.repeats)
            say(f"{name}: {figures[name]}")
    publish("text", figures, options.save)


if __name__ == "__main__":
    main()
