"""A small server of `/v1/completions` for the benchmarks' own tests, of the standard library alone.

    python completions.py PORT FILE

Writes the pid of a child in a session of its own to FILE, as Ray's processes have. Every answer is
one word a token, `max_tokens` of them; a prompt of "fail" is answered 500, one of "stop" ends
without a finish reason.
"""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Completions(BaseHTTPRequestHandler):
    """One request."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(500 if body["prompt"] == "fail" else 200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self.say({"choices": [{"text": " word", "finish_reason": None}]})
        if body["prompt"] != "stop":
            self.say({"choices": [{"text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": 3, "completion_tokens": body["max_tokens"]}
        self.say({"choices": [], "usage": usage})

    def say(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def main() -> None:
    """Serves until it is ended."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    Path(sys.argv[2]).write_text(str(child.pid))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Completions).serve_forever()


if __name__ == "__main__":
    main()
