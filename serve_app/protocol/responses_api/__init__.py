"""OpenAI's Responses API, without storage: requests, responses and events, over chat's generation.

Read `request.py` first; `items.py` converts input items to chat messages, `response.py` creates the
response and `events.py` the events of a streamed response. `tools.py` has the fields for tools,
`unsupported.py` the fields without effect. `protocol/response.py` is not part of this package: it
has the common parts of all responses. Protocol:
https://platform.openai.com/docs/api-reference/responses.
"""
