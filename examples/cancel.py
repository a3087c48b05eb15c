"""Cancel a job in the middle of its answer, which frees the GPU at once.

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
        "ignore_eos": True,  # the story goes on after its end, so that there is a job to cancel
    }
)
for chunk in job.stream():
    print(chunk["token"], flush=True)
    break  # the first words are enough

job.cancel()
print(job.status())
