"""Reads a checkpoint's tokenizer: `tokenizer.json` or `tokenizer.model`, and their configuration.

The result equals that of transformers' `PreTrainedTokenizerFast`, the class that its
`AutoTokenizer` chooses for Mixtral, without truncation and padding. Importing transformers for this
would add 0.7 s to each start.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import ModelLoadFailed
from serve_app.protocol import sentencepiece_model

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The content of the files."""

    backend: "Tokenizer"
    special_tokens: dict[str, str]
    """Special tokens by their name in a chat template, such as `bos_token`."""
    chat_template: str | None
    template_file: Path
    """The file of `chat_template`."""
    is_sentencepiece: bool
    """Whether the tokenizer comes from `tokenizer.model`."""
    info: dict[str, Any]
    """`tokenizer_config.json` with the special tokens and the chat template that are used."""


def read(folder: Path, custom_chat_template: str | None = None) -> TokenizerFiles:
    """Reads the files in `folder`. Raises `ModelLoadFailed`, which names the wrong file.

    `custom_chat_template` is the path or the text of a template that replaces the folder's.
    """
    file = folder / "tokenizer_config.json"
    config = _read_json(file)
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        backend, is_sentencepiece = sentencepiece_model.read(folder / "tokenizer.model"), True
    else:
        backend, is_sentencepiece = _backend(folder / "tokenizer.json"), False
    try:
        if "added_tokens_decoder" not in config:  # files of transformers before 4.34
            config |= _read_legacy(folder, backend, config)
        named, extra = _special_tokens(config)
        _add_tokens(backend, config["added_tokens_decoder"], named, extra)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadFailed(f"{file}: its special tokens cannot be read; mend it.") from error
    special_tokens = {name: token.content for name, token in named.items()}
    if is_sentencepiece:
        _require_ids(file, backend, config["added_tokens_decoder"])
        _add_post_processor(backend, config, special_tokens)
    if custom_chat_template is None:
        template, template_file = _chat_template(folder, file, config.get("chat_template"))
    else:
        template, template_file = _custom(custom_chat_template)
    info = {**config, **special_tokens, "chat_template": template}
    return TokenizerFiles(backend, special_tokens, template, template_file, is_sentencepiece, info)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadFailed(f"{file}: is missing.") from None
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"{file}: cannot be read; download it again.") from error
    if not isinstance(content, dict):
        raise ModelLoadFailed(f"{file}: holds no JSON object; download it again.")
    return content


def _backend(file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    if not file.exists():
        raise ModelLoadFailed(
            f"{file}: is missing, and there is no tokenizer.model; {sentencepiece_model.REMEDY}."
        )
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ModelLoadFailed(
            f"{file}: the tokenizer cannot be read; download it again."
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_legacy(folder: Path, backend: "Tokenizer", config: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of old files in the form of a later `tokenizer_config.json`."""
    read = {}
    if (folder / "special_tokens_map.json").exists():
        read = _read_json(folder / "special_tokens_map.json")
    decoder = {}
    if (folder / "added_tokens.json").exists():
        named, extra = _special_tokens(config | read)
        special = {token.content for token in (*named.values(), *extra)}
        existing = backend.get_added_tokens_decoder()
        for content, token_id in _read_json(folder / "added_tokens.json").items():
            if token_id not in existing:
                is_special = content in special
                flags = {"special": is_special, "normalized": not is_special}
                decoder[token_id] = {"content": content, **flags}
    return {**read, "added_tokens_decoder": decoder}


def _special_tokens(
    config: dict[str, Any],
) -> tuple[dict[str, "AddedToken"], list["AddedToken"]]:
    """Returns the special tokens with a name in chat templates, and the other ones."""
    named = {name: config[name] for name in _NAMES if config.get(name) is not None}
    named |= {
        name: value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str)
    }
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    return {name: _token(value) for name, value in named.items()}, [
        _token(value) for value in extra
    ]


def _token(value: str | dict[str, Any]) -> "AddedToken":
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {name: value[name] for name in _FLAGS if name in value}
    return AddedToken(value["content"], **flags, special=True)


def _add_tokens(
    backend: "Tokenizer",
    decoder: dict[Any, dict[str, Any]],
    named: dict[str, "AddedToken"],
    extra: list["AddedToken"],
) -> None:
    """Adds the missing tokens to `backend`; `decoder` maps ids to tokens."""
    from tokenizers import AddedToken

    present = backend.get_added_tokens_decoder().values()
    has, contents = {repr(token) for token in present}, {token.content for token in present}
    names = {token.content for token in named.values()}
    missing = []
    for _, fields in sorted(decoder.items(), key=lambda item: int(item[0])):
        token = AddedToken(**fields)
        if repr(token) not in has:
            token.special = token.special or token.content in names
            missing.append(token)
            contents.add(token.content)
    for token in (*named.values(), *extra):
        if token.content not in contents:
            missing.append(token)
            contents.add(token.content)
    backend.add_tokens(missing)


def _require_ids(file: Path, backend: "Tokenizer", decoder: dict[Any, dict[str, Any]]) -> None:
    """Raises `ModelLoadFailed` if an added token has another id than in `decoder`."""
    for token_id, fields in decoder.items():
        if (got := backend.token_to_id(fields["content"])) != int(token_id):
            raise ModelLoadFailed(
                f"{file}: its added token {fields['content']!r} has the id {token_id}, which "
                f"tokenizer.model gives to another one ({got}); {sentencepiece_model.REMEDY}."
            )


def _add_post_processor(
    backend: "Tokenizer", config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Adds BOS before a text and EOS after it if the configuration says so."""
    from tokenizers.processors import TemplateProcessing

    bos, eos = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    before = [bos] if bos and config.get("add_bos_token", True) else []
    after = [eos] if eos and config.get("add_eos_token", False) else []
    ids = [(token, backend.token_to_id(token)) for token in (*before, *after)]
    backend.post_processor = TemplateProcessing([*before, "$A", *after], None, ids)


def _chat_template(folder: Path, config_file: Path, value: Any) -> tuple[str | None, Path]:
    """Returns the default chat template, which may be in a separate file, and its file."""
    if (file := folder / "chat_template.jinja").exists():
        try:
            return file.read_text(encoding="utf-8"), file
        except (OSError, ValueError) as error:
            raise ModelLoadFailed(f"{file}: cannot be read; download it again.") from error
    if isinstance(value, list):
        named = [template for template in value if isinstance(template, dict)]
        value = {template.get("name"): template.get("template") for template in named}
    if isinstance(value, dict):
        if "default" not in value:
            raise ModelLoadFailed(f"{config_file}: none of its chat templates is named default.")
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise ModelLoadFailed(f"{config_file}: its `chat_template` is no text; mend it.")
    return value, config_file


def _custom(setting: str) -> tuple[str, Path]:
    """Returns the template of the setting, and its file or the name of the setting."""
    if any(mark in setting for mark in ("{{", "{%", "\n")):
        return setting, Path("model.custom_chat_template")
    try:
        return Path(setting).read_text(encoding="utf-8"), Path(setting)
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(
            f"{setting}: cannot be read; `model.custom_chat_template` takes the path of a chat "
            "template, or its text."
        ) from error
