"""Writes Mixtral 8x7B's own tokenizer, 32,000 entries, as a checkpoint has it.

The SentencePiece model comes from the package mistral-common (Apache-2.0), which also has Mistral's
own encoder of conversations.
"""

import json
import shutil
from pathlib import Path

from serve_app.protocol import sentencepiece_model
from tools.tiny.tokenizer import CHAT_TEMPLATE

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def model_file() -> Path:
    """The SentencePiece model of Mixtral 8x7B."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def write(folder: Path) -> Path:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, and returns it.

    The tokenizer is Mixtral's pipeline: `Metaspace` before BPE, and BOS before a text.
    """
    from tokenizers import pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = sentencepiece_model.read(model_file())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder)
    return folder


def write_model(folder: Path) -> Path:
    """Writes tokenizer.model and tokenizer_config.json into `folder`, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model_file(), folder / "tokenizer.model")
    write_config(folder)
    return folder


def write_config(folder: Path) -> None:
    """Writes tokenizer_config.json."""
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
