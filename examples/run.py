"""Ask one question and wait for the answer.

    export RUNPOD_API_KEY=...        # the key of your account
    export RUNPOD_ENDPOINT_ID=...    # the endpoint's id, from its page
    python examples/run.py "What is the capital of France?"

`RUNPOD_ENDPOINT_BASE_URL` makes the client use another platform, such as `python -m emulator`.
"""

import os
import sys

import runpod

prompt = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?"
endpoint = runpod.Endpoint(os.environ["RUNPOD_ENDPOINT_ID"], api_key=os.environ["RUNPOD_API_KEY"])

job = endpoint.run({"prompt": prompt, "max_tokens": 100, "temperature": 0})
# The first job of a new worker waits for the model, which can take minutes.
output = job.output(timeout=1800)
if job.status() != "COMPLETED":
    sys.exit(f"The job ended as {job.status()}; examples/retry.py shows how to read why.")

print(output["text"])
print(f"{output['finish_reason']}, {output['usage']['completion_tokens']} tokens", file=sys.stderr)
