"""Merges a conversation into the order of messages with which Mixtral was trained."""

from collections.abc import Sequence

Turn = dict[str, str]
"""One message in the form of chat templates: `role` (system, user or assistant) and `content`."""


def merged(messages: Sequence[Turn], *, keeps_system: bool) -> list[Turn]:
    """Returns `messages` as alternating questions and answers, with at most one system message
    before them.

    The rules are those of Mistral's own encoder (mistral-common's `InstructRequestNormalizer`):

    - The texts of all system messages, joined by an empty line, come first. With `keeps_system`
      they are a system message; otherwise they precede the first question after an empty line.
    - Adjacent messages of one role become one message, joined by an empty line.
    - An empty question is inserted before a first message of the assistant.
    """
    system = _joined([message["content"] for message in messages if message["role"] == "system"])
    turns: list[Turn] = []
    for message in messages:
        if message["role"] == "system":
            continue
        if turns and turns[-1]["role"] == message["role"]:
            content = _joined([turns[-1]["content"], message["content"]])
            turns[-1] = {"role": message["role"], "content": content}
        else:
            turns.append(message)
    if not turns or turns[0]["role"] != "user":
        turns.insert(0, {"role": "user", "content": ""})
    if not system:
        return turns
    if keeps_system:
        return [{"role": "system", "content": system}, *turns]
    return [{"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]


def _joined(texts: Sequence[str]) -> str:
    return "\n\n".join(filter(None, texts))
