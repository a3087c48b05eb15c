"""Use OpenAI's client through RunPod's gateway: only URL and key differ.

export RUNPOD_API_KEY=... RUNPOD_ENDPOINT_ID=...
python examples/openai_chat.py "What is the capital of France?"
"""

import os
import sys

import openai

prompt = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?"
base = os.environ.get("RUNPOD_ENDPOINT_BASE_URL", "https://api.runpod.ai/v2")
client = openai.OpenAI(
    base_url=f"{base}/{os.environ['RUNPOD_ENDPOINT_ID']}/openai/v1",
    api_key=os.environ["RUNPOD_API_KEY"],
    timeout=1800,  # a new worker loads the model first
)

model = client.models.list().data[0].id
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": prompt}],
    max_tokens=100,
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
