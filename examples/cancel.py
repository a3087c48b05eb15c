"""Stop a job in the middle of its answer: the GPU is free for others at once.

export RUNPOD_API_KEY=... RUNPOD_ENDPOINT_ID=...
python examples/cancel.py
"""

import os

import runpod

endpoint = runpod.Endpoint(os.environ["RUNPOD_ENDPOINT_ID"], api_key=os.environ["RUNPOD_API_KEY"])

job = endpoint.run(
    {
        "prompt": "Write a long story about the sea.",
        "stream": True,
        "max_tokens": 4000,
        "ignore_eos": True,  # goes on where the story is over, so that there is a job to stop
    }
)
for chunk in job.stream():
    print(chunk["token"], flush=True)
    break  # the first words are enough

job.cancel()
print(job.status())
