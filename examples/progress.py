"""Send many prompts as one job and show its progress.

    export RUNPOD_API_KEY=... RUNPOD_ENDPOINT_ID=...
    python examples/progress.py prompts.txt     # a prompt on each line

While a job runs, its output is its last progress update: on a new worker the phase of the model's
load, then how many prompts are done.
"""

import os
import sys
import time
from pathlib import Path

import runpod

if len(sys.argv) > 1:
    prompts = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
else:
    prompts = [f"What is {n} + {n}?" for n in range(10)]
endpoint = runpod.Endpoint(os.environ["RUNPOD_ENDPOINT_ID"], api_key=os.environ["RUNPOD_API_KEY"])

job = endpoint.run({"prompts": prompts, "max_tokens": 100, "temperature": 0})
shown = None
while job.status() in ("IN_QUEUE", "IN_PROGRESS"):
    update = job.output()
    # The job may have ended since the last poll; then the output is the answer.
    if update and update != shown and "results" not in update:
        print(f"{update.get('progress', 0):3} %  {update.get('message', update.get('status'))}")
        shown = update
    time.sleep(0.5)
if job.status() != "COMPLETED":
    sys.exit(f"The job ended as {job.status()}; examples/retry.py shows how to read why.")

answer = job.output()
for prompt, result in zip(prompts, answer["results"], strict=True):
    # Results are in the order of the prompts; each failed one has an error of its own.
    print(f"{prompt}  ->  {result['error']['message'] if 'error' in result else result['text']}")
