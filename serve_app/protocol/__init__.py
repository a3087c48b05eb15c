"""Requests and responses of the API: OpenAI's, Anthropic's, vLLM's and `/prompt`'s schemas.

Read `call.py` first: it defines what every endpoint sends and gets. Then `fields.py` (how a body
is validated) and `chat.py` (one request with its response); `completions.py`, `prompt.py` and
`tokens.py` are built the same way; `responses_api/` and `messages_api/` translate OpenAI's and
Anthropic's newer APIs. `tokenizer.py` turns texts and conversations into token ids, `text.py` token
ids into text.
"""
