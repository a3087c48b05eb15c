"""Send a failed job again, with growing pauses, as long as its error says `retry`.

    export RUNPOD_API_KEY=... RUNPOD_ENDPOINT_ID=...
    python examples/retry.py "What is the capital of France?"

The client does not show why a job failed. `/status` does, in one JSON string, whose `retry` says
whether the same job may succeed later.
"""

import json
import os
import sys
import time
from typing import Any

import runpod

MAX_TRIES = 5


def why(endpoint: Any, job: Any) -> dict[str, Any]:
    """Returns the error of a job that did not complete: at least `message`, `status` and
    `retry`."""
    state = endpoint.rp_client.get(f"{endpoint.endpoint_id}/status/{job.job_id}")
    try:
        error: dict[str, Any] = json.loads(state["error"])["error"]
    except (KeyError, TypeError, ValueError):
        # A text of the platform: the job was cancelled, or no worker answered it in time.
        message = str(state.get("error") or "there was no answer")
        is_timed_out = state["status"] == "TIMED_OUT"
        return {"message": message, "status": state["status"], "retry": is_timed_out}
    return error


def run_with_retry(endpoint: Any, given: dict[str, Any]) -> Any:
    """Returns the output of the first job that completes; exits when another try cannot help."""
    for attempt in range(MAX_TRIES):
        job = endpoint.run(given)
        output = job.output(timeout=1800)
        if job.status() == "COMPLETED":
            return output
        error = why(endpoint, job)
        print(f"Try {attempt + 1}: {error['status']}: {error['message']}", file=sys.stderr)
        if not error["retry"]:
            sys.exit("The same job would fail again.")
        time.sleep(2**attempt)
    sys.exit(f"{MAX_TRIES} tries failed.")


prompt = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?"
runpod_endpoint = runpod.Endpoint(
    os.environ["RUNPOD_ENDPOINT_ID"], api_key=os.environ["RUNPOD_API_KEY"]
)
print(run_with_retry(runpod_endpoint, {"prompt": prompt, "max_tokens": 100})["text"])
