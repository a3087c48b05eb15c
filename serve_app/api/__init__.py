"""The HTTP API and the deployment class: routes, their handlers, the ingress, metrics.

Read `routes.py` first, the table of all routes. `server.py` has the deployment class, which both
endpoints call, on top of `served_model.py`, which the handlers use; `ingress.py` converts HTTP
requests to calls. Then follow one handler, `chat.py`, into `input_processor.py` (prompt to token
ids) and `answer.py` (the engine's deltas to text). The other modules, by subject:

    handlers        completions, prompt, responses, messages, tokens, status, pages
    before Serve    guard (bodies and headers), early_answer (401, 429, `/ping`), http_1_0
    requests        route, request_body, request_id, api_keys, origin, cors
    responses       event_stream (server-sent events), error_response
    lists           choices (several answers to one request), list_places (their places)
    documents       openapi, from the routes and descriptions
    measurements    metrics/, tracing, loop_lag
    without HTTP    batch (`mixtral-serve batch`), trial (`mixtral-serve check --load`)
"""
