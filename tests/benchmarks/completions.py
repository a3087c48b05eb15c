"""A small server of `/v1/completions` for the tests of the benchmarks; standard library alone.

    python completions.py PORT FILE

Starts a child in a session of its own, as Ray does, and writes its pid to FILE. An answer has one
word per token and `max_tokens` tokens; one of more than 1,000 has at most 100 tokens a second. The
prompt "fail" gets a 500, "stop" no finish reason.
"""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Completions(BaseHTTPRequestHandler):
    """Answers one request."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(500 if body["prompt"] == "fail" else 200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            time.sleep(0.01 if body["max_tokens"] > 1000 else 0)
            self.say({"choices": [{"text": " word", "finish_reason": None}]})
        if body["prompt"] != "stop":
            self.say({"choices": [{"text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": 3, "completion_tokens": body["max_tokens"]}
        self.say({"choices": [], "usage": usage})

    def say(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


def main() -> None:
    """Serves until the process is ended."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    Path(sys.argv[2]).write_text(str(child.pid))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Completions).serve_forever()


if __name__ == "__main__":
    main()
