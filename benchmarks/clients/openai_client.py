"""The client of the features of `openai.py`."""

from openai import OpenAI

from benchmarks.clients.features import Server


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.v1, api_key=server.key, max_retries=0)
