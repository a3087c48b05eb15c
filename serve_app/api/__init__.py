"""The HTTP API and the deployment class: routes, their handlers, the ingress, metrics.

Read `routes.py` first, the table of all routes. `server.py` has the deployment class, which both
endpoints call; `ingress.py` converts HTTP requests to calls. `guard.py` and `early_answer.py` run
before Ray Serve. Then follow one handler, `chat.py`, into `input_processor.py` (prompt to token
ids) and `answer.py` (the engine's deltas to text). `pages.py` serves the files in `static/` and the
OpenAPI document that `openapi.py` creates from the routes.
"""
