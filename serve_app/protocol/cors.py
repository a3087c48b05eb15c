"""CORS: the requests and response headers that pages of an allowed origin may use.

Protocol: https://fetch.spec.whatwg.org/#http-cors-protocol. A replica, HAProxy and the health
server send the same values. The allowed origins are `ApiSettings.allowed_origins`.
"""

from serve_app.protocol.allowance import HEADERS
from serve_app.protocol.header_names import ANTHROPIC_ID, CLIENT_ID, OUR_ID

EXPOSED = (CLIENT_ID, OUR_ID, ANTHROPIC_ID, "Retry-After", *HEADERS)
"""Response headers that a page may read, in addition to the standard ones."""
METHODS = ("GET", "POST")
MAX_AGE_S = 600
"""Seconds for which a browser may keep the answer to a preflight request."""
