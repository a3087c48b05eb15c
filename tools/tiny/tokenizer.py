"""Mixtral's kind of tokenizer, made small: BPE over `▁` words that falls back to bytes.

Writes `tokenizer.json` and `tokenizer_config.json`. Only ASCII has tokens of its own; everything
else (é, 🙂, 你) is spelled in byte tokens, and each digit is a token, so that sums can be learned.
`[INST]` and `[/INST]` are plain text, as in Mixtral 8x7B.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 768
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

WORD = r"▁?\[/?INST\]|▁?[A-Za-z]+|[0-9]|▁?[^▁A-Za-z0-9]|▁"
"""No merge crosses two of these, so that nothing need split the text when it is encoded."""

CHAT_TEMPLATE = (
    "{%- set turns = messages %}"
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- endif %}"
    "{{- bos_token }}"
    "{%- for message in turns %}"
    "{%- if message['role'] not in ['user', 'assistant'] %}"
    "{{- raise_exception('Only user and assistant messages may follow an optional first system "
    "message.') }}"
    "{%- elif (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After an optional system message, roles must alternate user and "
    "assistant, beginning with user.') }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content'] + eos_token }}"
    "{%- elif loop.first and system is defined %}"
    "{{- ' [INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}"
    "{{- ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{%- endif %}"
    "{%- endfor %}"
)
"""Renders `<s> [INST] question [/INST] answer</s>`; the system message joins the first question."""


def write(folder: Path, texts: Iterable[str]) -> None:
    """Trains the vocabulary on `texts` and writes both files into `folder`."""
    vocab, merges = _train(texts)
    tokenizer = _assemble(vocab, merges)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(), indent=2) + "\n")


def _train(texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges learned on ASCII words; ids are special, bytes, then the trainer's order."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"[^\x20-\x7e]"), ""),
            normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    printable = [chr(code) for code in range(0x21, 0x7F)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(BYTES),
        initial_alphabet=printable,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    ordered = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokens = (*SPECIAL, *BYTES, *ordered)
    return {token: id for id, token in enumerate(tokens)}, [tuple(m) for m in learned["merges"]]


def _assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Returns the same pipeline as Mixtral's tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
        "chat_template": CHAT_TEMPLATE,
    }
