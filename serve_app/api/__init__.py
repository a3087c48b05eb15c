"""Routes, the HTTP ingress, the server, generation and metrics. Read `server.py` first."""
