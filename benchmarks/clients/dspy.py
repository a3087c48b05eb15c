"""dspy: Predict by its chat, JSON and XML adapters, typed signatures, ReAct."""

from typing import Any, Literal

import dspy
from dspy.lm15 import (
    AccessPolicy,
    ModelSupport,
    OpenAIChatCompat,
    ProviderDefinition,
    register_provider,
)

from benchmarks.clients.features import Server, feature, main
from benchmarks.clients.weather import TEXT, Weather

CHAT = r"\[\[ ## city ## \]\]\n(Paris|London)\n\n\[\[ ## completed ## \]\]"
"""The answer that the chat adapter requests in words; the tiny model does not follow such
instructions."""
DAYS = r'\[\[ ## weather ## \]\]\n\{"city": "(Paris|London)", "days": [1-7]\}'


class Place(dspy.Signature):  # type: ignore[misc]
    """Names the city."""

    question: str = dspy.InputField()
    city: Literal["Paris", "London"] = dspy.OutputField()


class Forecast(dspy.Signature):  # type: ignore[misc]
    """Gives the weather."""

    question: str = dspy.InputField()
    weather: Weather = dspy.OutputField()


def model(server: Server, provider: str = "openai", **fields: Any) -> Any:
    options = {"max_tokens": 300, "temperature": 0, "cache": False, "num_retries": 0} | fields
    return dspy.LM(f"{provider}/{server.model}", api_base=server.v1, api_key=server.key, **options)


def steered(server: Server, regex: str) -> Any:
    return model(server, extra_body={"structured_outputs": {"regex": regex}})


@feature
def lm(server: Server) -> None:
    (answer,) = model(server)(TEXT)
    assert answer


@feature
def predict(server: Server) -> None:
    with dspy.context(lm=steered(server, CHAT)):
        assert dspy.Predict(Place)(question=TEXT).city in {"Paris", "London"}


@feature
def predict_typed(server: Server) -> None:
    with dspy.context(lm=steered(server, DAYS)):
        assert isinstance(dspy.Predict(Forecast)(question=TEXT).weather, Weather)


@feature
def json_adapter(server: Server) -> None:
    # The adapter asks for any JSON unless the model is declared to take a schema.
    declared = ProviderDefinition.chat(
        AccessPolicy(provider="mixtral", env_keys=(), base_url=server.v1),
        compat=OpenAIChatCompat.preset("vllm"),
    )
    register_provider(declared, supports=ModelSupport(response_schema=True))
    with dspy.context(lm=model(server, "mixtral"), adapter=dspy.JSONAdapter()):
        assert isinstance(dspy.Predict(Forecast)(question=TEXT).weather, Weather)


@feature
def n(server: Server) -> None:
    answers = model(server, n=2, temperature=1.0)(TEXT)
    assert len(answers) == 2


@feature
def stream(server: Server) -> None:
    with dspy.context(lm=steered(server, CHAT)):
        predict = dspy.streamify(
            dspy.Predict(Place),
            stream_listeners=[dspy.streaming.StreamListener("city")],
            async_streaming=False,
        )
        *_, last = predict(question=TEXT)
    assert last.city in {"Paris", "London"}


@feature
def text_model(server: Server) -> None:
    (answer,) = model(server, model_type="text")("The capital")
    assert answer


@feature
def responses_model(server: Server) -> None:
    assert model(server, model_type="responses")(TEXT)


if __name__ == "__main__":
    main()
