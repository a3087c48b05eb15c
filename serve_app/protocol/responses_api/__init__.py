"""OpenAI's Responses API, without storage: requests, responses and events, over chat's generation.

Read `request.py` first; `items.py` turns input items into chat messages, `response.py` makes the
response and `events.py` the events of a streamed one. `tools.py` has the fields for tools,
`unsupported.py` those without effect. The package is not `protocol/response.py`,
which has what the responses of all routes have in common. Protocol:
https://platform.openai.com/docs/api-reference/responses.
"""
