"""Print an answer while it is generated.

    export RUNPOD_API_KEY=... RUNPOD_ENDPOINT_ID=...
    python examples/stream.py "Count from 1 to 5."

The client polls once a second, so the text comes in large pieces. examples/openai_chat.py prints
each token when it is generated.
"""

import os
import sys

import runpod

prompt = sys.argv[1] if len(sys.argv) > 1 else "Count from 1 to 5."
endpoint = runpod.Endpoint(os.environ["RUNPOD_ENDPOINT_ID"], api_key=os.environ["RUNPOD_API_KEY"])

job = endpoint.run({"prompt": prompt, "stream": True, "max_tokens": 100, "temperature": 0})
for chunk in job.stream():
    print(chunk["token"], end="", flush=True)
    if chunk["finished"]:
        print()
        if chunk["finish_reason"] == "error":
            # A failed stream ends with its error, because the client does not show a job's error.
            again = "worth another try" if chunk["retry"] else "the same again would fail again"
            sys.exit(f"{chunk['status']}: {chunk['message']} ({again})")
        tokens = chunk["usage"]["completion_tokens"]
        print(f"{chunk['finish_reason']}, {tokens} tokens", file=sys.stderr)
