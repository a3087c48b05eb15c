"""Names of HTTP headers that a replica, HAProxy and the health server have in common.

A response has the ids of its request:

x-mixtral-request-id    our id, which is also in the body, the error and the log
x-request-id            the client's id, or ours if it sent none
request-id              our id, only below `/v1/messages`, for Anthropic's clients
"""

OUR_ID = "x-mixtral-request-id"
CLIENT_ID = "x-request-id"
ANTHROPIC_ID = "request-id"
MAX_ID_CHARS = 128
"""Maximum length of a client's id."""

PLACES = "x-mixtral-places"
"""Header of a replica's answer for HAProxy, which removes it: the fields of `Places` in order,
separated by commas, with measured seconds in microseconds."""
REFUSED = "x-mixtral-refused"
"""Header of a request from HAProxy: the number of requests that it has refused since the last one
that it passed on."""
