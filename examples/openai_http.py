"""Use OpenAI's client with a server: on a laptop, a GPU machine, or a load-balancing endpoint.

    python examples/openai_http.py http://127.0.0.1:8000/v1

    export RUNPOD_API_KEY=...
    python examples/openai_http.py https://ENDPOINT_ID.api.runpod.ai/v1

A load-balancing endpoint has no queue: while no worker is ready requests fail, and the client sends
them again.
"""

import os
import sys

import openai

client = openai.OpenAI(
    base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1",
    api_key=os.environ.get("RUNPOD_API_KEY", "none"),
    max_retries=8,
)

model = client.models.list().data[0].id
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    max_tokens=100,
    temperature=0,
)
print(answer.choices[0].message.content)

try:
    client.chat.completions.create(model=model, messages=[], temperature=0)
except openai.BadRequestError as error:
    print(f"An error names the field and says what to change: {error.param}: {error.message}")
