"""Anthropic's Messages API: requests, responses and events, over the same generation as chat.

Read `request.py` first; `content.py` converts content blocks to chat messages, and `response.py`
converts the answer to a message or to events. `tools.py` has the fields for tools, `unsupported.py`
the fields without effect. `protocol/messages.py` is not part of this package: it has the messages
of OpenAI's API. Protocol: https://platform.claude.com/docs/en/api/messages.
"""
