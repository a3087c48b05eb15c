"""Renames the special tokens of a tokenizer, so that no text of a grammar becomes one.

llguidance tokenizes the text that a grammar forces. It would take the text `</s>` of a constant for
the token of that name, which ends the answer.
"""

import json
import secrets
from typing import Any


def unnamed(tokenizer: str) -> str:
    """Returns a `tokenizer.json` with random names for its special tokens. Ids do not change."""
    content = json.loads(tokenizer)
    mark = secrets.token_hex(8)
    names = {
        token["content"]: f"<{mark}-{token['id']}>"
        for token in content["added_tokens"]
        if token["special"]
    }
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _rename(content["model"], names)
    return json.dumps(content)


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Renames tokens in the vocabulary. Merges whose result is a special token are dropped."""
    model["vocab"] = {names.get(name, name): index for name, index in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _result(merge) not in names]


def _result(merge: str | list[str]) -> str:
    """Returns the token that a merge makes, from either form of `tokenizer.json`."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)
