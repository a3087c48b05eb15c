"""OpenAI's client, unmodified, through RunPod's gateway."""

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from emulator import client_api
from emulator.platform import Platform
from emulator.queue import Job

pytestmark = pytest.mark.ray

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def gateway(tiny_platform: Platform, first_jobs: list[Job]) -> openai.OpenAI:
    """OpenAI's Python client, with the gateway's URL."""
    url = f"{tiny_platform.url}/v2/ep/openai/v1"
    return openai.OpenAI(base_url=url, api_key=client_api.KEY, max_retries=0, timeout=60)


def test_the_openai_client_chats(gateway: openai.OpenAI) -> None:
    """A plain and a streamed chat answer have the same text and usage."""
    whole = gateway.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=12
    )
    stream = gateway.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_openai_client_completes_and_lists_models(gateway: openai.OpenAI) -> None:
    """The gateway serves GET routes and `/v1/completions`."""
    assert [model.id for model in gateway.models.list()] == ["tiny"]
    assert gateway.models.retrieve("tiny").id == "tiny"
    whole = gateway.completions.create(model="tiny", prompt="2 + 3", temperature=0, max_tokens=5)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 5


def test_the_openai_client_raises_errors(gateway: openai.OpenAI) -> None:
    """A refused request raises in the client with the field's name, streamed or not."""
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.chat.completions.create(model="tiny", messages=MESSAGES, temperature=2.1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.APIError) as streamed:
        list(
            gateway.chat.completions.create(
                model="tiny", messages=MESSAGES, temperature=2.1, stream=True
            )
        )
    assert streamed.value.param == "temperature"
