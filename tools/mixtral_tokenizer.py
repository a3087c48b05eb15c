"""Writes Mixtral 8x7B's own tokenizer, 32,000 entries, as a checkpoint has it; 8x22B's too.

The SentencePiece models come from the package mistral-common (Apache-2.0), which also has Mistral's
own encoder of conversations.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.protocol import sentencepiece_model
from tools.tiny.tokenizer import CHAT_TEMPLATE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


TOOL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles should alternate.') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
"""A chat template with tool tokens, for conversations without tools."""

TOOLS = "mistral_instruct_tokenizer_240323.model.v3"
"""Mixtral 8x22B's SentencePiece model, as mistral-common calls it."""


def model_file(name: str = "tokenizer.model.v1") -> Path:
    """Returns a SentencePiece model that mistral-common has. The first is Mixtral 8x7B's."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / name


def write(folder: Path) -> Path:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, and returns it."""
    return _write(folder, sentencepiece_model.read(model_file()), CHAT_TEMPLATE)


def write_with_tools(folder: Path) -> Path:
    """Writes the tokenizer of Mixtral 8x22B, 32,768 entries, among them the tool tokens."""
    return _write(folder, sentencepiece_model.read(model_file(TOOLS)), TOOL_TEMPLATE)


def _write(folder: Path, tokenizer: "Tokenizer", chat_template: str) -> Path:
    """Adds Mixtral's pipeline to the tokenizer, `Metaspace` before BPE and BOS before a text, and
    writes it."""
    from tokenizers import pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, chat_template)
    return folder


def write_model(folder: Path, name: str = "tokenizer.model.v1") -> Path:
    """Writes tokenizer.model and tokenizer_config.json into `folder`, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model_file(name), folder / "tokenizer.model")
    write_config(folder)
    return folder


def write_config(folder: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """Writes tokenizer_config.json."""
    config = {**CONFIG, "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
