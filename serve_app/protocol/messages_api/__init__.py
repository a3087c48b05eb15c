"""Anthropic's Messages API: requests, responses and events, over the same generation as chat.

Read `request.py` first; `content.py` turns content blocks into chat messages, `response.py` the
answer into a message or into events. `tools.py` has the fields for tools, `unsupported.py` those
without effect. The package is not `protocol/messages.py`, which has the
messages of OpenAI's API. Protocol: https://platform.claude.com/docs/en/api/messages.
"""
