"""openai, the package: its plain calls, its helpers, its typed answers."""

import openai
from openai import OpenAI

# These register their features.
from benchmarks.clients import openai_chat, openai_responses, openai_tools  # noqa: F401
from benchmarks.clients.features import Server, feature, main, raised
from benchmarks.clients.openai_client import client
from benchmarks.clients.weather import QUESTION


@feature
def models(server: Server) -> None:
    listed = client(server).models.list()
    assert [model.id for model in listed.data] == [server.model]
    assert client(server).models.retrieve(server.model).id == server.model


@feature
def completions(server: Server) -> None:
    answer = client(server).completions.create(
        model=server.model,
        prompt=["The capital", "The"],
        max_tokens=8,
        logprobs=2,
        n=2,
        temperature=0,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs and choice.logprobs.tokens for choice in answer.choices)


@feature
def completions_stream(server: Server) -> None:
    chunks = client(server).completions.create(
        model=server.model, prompt="The capital", max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks)


@feature
def completions_echo_logprobs(server: Server) -> None:
    answer = client(server).completions.create(
        model=server.model, prompt="The capital", max_tokens=1, logprobs=1, echo=True
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("The capital")
    assert logprobs
    assert logprobs.token_logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(each <= 0 for each in logprobs.token_logprobs[1:])


@feature
def errors(server: Server) -> None:
    def hot() -> None:
        client(server).chat.completions.create(model=server.model, messages=QUESTION, temperature=9)

    assert raised(openai.BadRequestError, hot).param == "temperature"
    stranger = OpenAI(base_url=server.v1, api_key="wrong", max_retries=0)
    assert raised(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"


if __name__ == "__main__":
    main()
