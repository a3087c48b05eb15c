"""Structured outputs of the tiny Mixtral, whose answers are checked by jsonschema."""

import asyncio
import inspect
import json
import random
import re
from typing import Annotated, Any, Literal

import jsonschema
import openai.types.chat
import pydantic
import pytest

from serve_app.api.server import MixtralServer
from tests.api.conftest import Endpoint
from tests.fakes import tokenizer
from tests.protocol.test_json_schema_suite import held

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]


async def items(server: MixtralServer, path: str, body: dict[str, Any]) -> list[Any]:
    return [item async for item in server.call("POST", path, body, "1")]


async def ask(server: MixtralServer, path: str = CHAT, **fields: Any) -> Any:
    """Returns the last item: the body of the answer, or the error."""
    prompt = {"messages": QUESTION} if path == CHAT else {"prompt": "What is 2 + 3?"}
    return (await items(server, path, {**prompt, **fields}))[-1]


def random_schema(chooser: random.Random, depth: int) -> dict[str, Any]:
    """Returns a schema of closed objects, lists and bounded scalars, at most `depth` levels
    deep."""
    scalars: list[dict[str, Any]] = [
        {"type": "integer", "minimum": chooser.randint(-9, 0), "maximum": chooser.randint(1, 99)},
        {"type": "string", "maxLength": chooser.randint(0, 12)},
        {"enum": chooser.sample(["red", "green", 3, None, True, "ü"], 3)},
        {"type": ["boolean", "null"]},
        {"type": "string", "format": chooser.choice(["date", "uuid", "ipv4"])},
    ]
    kind = chooser.choice(["object", "array", "scalar"]) if depth else "scalar"
    if kind == "scalar":
        return chooser.choice(scalars)
    inner = [random_schema(chooser, depth - 1) for _ in range(chooser.randint(1, 3))]
    if kind == "array":
        return {"type": "array", "items": {"anyOf": inner}, "minItems": 1, "maxItems": 3}
    names = [f"name_{number}" for number in range(len(inner))]
    return {
        "type": "object",
        "properties": dict(zip(names, inner, strict=True)),
        "required": chooser.sample(names, chooser.randint(0, len(names))),
        "additionalProperties": False,
    }


def schemas() -> dict[str, Any]:
    """200 JSON schemas: those that pydantic makes for real classes, nested, with unions and enums,
    those of the official test suite, and random ones."""
    chooser = random.Random(1)
    classes = {
        name: kind.model_json_schema()
        for name, kind in inspect.getmembers(openai.types.chat, inspect.isclass)
        if issubclass(kind, pydantic.BaseModel)
    }
    others = {
        "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        "numbers": {"type": "object", "additionalProperties": {"type": "number", "minimum": 3}},
        "pattern": {"type": "string", "pattern": "^[a-c]{2,5}$"},
        "any": True,
    }
    at_random = {f"random {number}": random_schema(chooser, depth=3) for number in range(30)}
    # Python's `re`, and so jsonschema, has no Unicode properties.
    suite = {name: it for name, it in held().items() if r"\p" not in str(it)}
    return classes | suite | others | at_random


END = 2
# At a temperature of 1 the tiny model would write strings, lists and numbers without end.
CLOSING = {
    str(token_id): 12.0
    for token_id in range(768)
    if tokenizer().token_bytes(token_id).strip() in (b'"', b"}", b"]", b'"}', b'"]', b"},", b'",')
} | {str(END): 12.0}


def test_answers_follow_their_schemas(tiny: MixtralServer) -> None:
    """In one batch at temperature 1, each answer that is not cut by its limit is valid JSON of its
    own schema, and 200 are not cut."""
    wanted = schemas()

    async def answers() -> list[Any]:
        return await asyncio.gather(
            *(
                ask(
                    tiny,
                    temperature=1,
                    seed=seed,
                    max_tokens=400,
                    logit_bias=CLOSING,
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "it", "schema": schema},
                    },
                )
                for seed, schema in enumerate(wanted.values())
            )
        )

    num_cut = 0
    for schema, answer in zip(wanted.values(), asyncio.run(answers()), strict=True):
        (choice,) = answer["body"]["choices"]
        if choice["finish_reason"] == "length":
            num_cut += 1
            continue
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    assert len(wanted) - num_cut >= 200


class Capital(pydantic.BaseModel):
    country: Literal["France", "Italy"]
    capital: Annotated[str, pydantic.StringConstraints(pattern="^[A-Z][a-z]{2,9}$")]
    neighbors: list[str] | None


def test_openais_client_parses_an_answer(endpoint: Endpoint, tiny: MixtralServer) -> None:
    """`parse` and its stream of the unmodified client give objects of the caller's class."""
    endpoint.server = tiny
    how: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "response_format": Capital,
        "temperature": 0,
        "max_tokens": 80,
    }
    with endpoint.client() as client:
        parsed = client.chat.completions.parse(**how).choices[0].message.parsed
        with client.chat.completions.stream(**how) as stream:
            streamed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Capital)
    assert streamed == parsed


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/prompt"])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_every_route_follows_a_grammar_to_its_end(
    tiny: MixtralServer, path: str, ignore_eos: bool
) -> None:
    """The answer ends with the grammar, also where the model's end token is ignored."""
    regex = "[0-9]{3}-[a-z]{4}"
    how: dict[str, Any] = {
        "structured_outputs": {"regex": regex},
        "temperature": 1,
        "seed": 1,
        "max_tokens": 50,
    }
    body = asyncio.run(ask(tiny, path, ignore_eos=ignore_eos, **how))["body"]
    answer = body if path == "/prompt" else body["choices"][0]
    content = answer["message"]["content"] if path == CHAT else answer["text"]
    assert re.fullmatch(regex, content)
    assert answer["finish_reason"] == "stop"


def test_the_chunks_of_a_stream_are_the_whole_answer(tiny: MixtralServer) -> None:
    """Streamed and whole answers with a grammar have the same text and end."""
    how = {
        "messages": QUESTION,
        "response_format": {"type": "json_object"},
        "temperature": 0,
        "max_tokens": 40,
    }
    (whole,) = asyncio.run(items(tiny, CHAT, how))
    chunks = [it["chunk"] for it in asyncio.run(items(tiny, CHAT, {**how, "stream": True}))]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    (choice,) = whole["body"]["choices"]
    assert text == choice["message"]["content"]
    assert isinstance(json.loads(text), dict)
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"] == "stop"


def test_free_answers_beside_grammars_are_what_they_are_alone(tiny: MixtralServer) -> None:
    """A batch with grammars changes no answer of a request without one."""
    free: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 30}
    bound = {"structured_outputs": {"regex": "[a-z ]{20,40}"}, "temperature": 1, "max_tokens": 30}

    async def together() -> list[Any]:
        return await asyncio.gather(
            *(ask(tiny, **(free if i % 2 else bound)) for i in range(8)),
        )

    alone = asyncio.run(ask(tiny, **free))["body"]["choices"]
    assert all(it["body"]["choices"] == alone for it in asyncio.run(together())[1::2])


def test_a_grammar_that_grows_too_complex_fails_its_own_request_only(tiny: MixtralServer) -> None:
    """A request whose grammar becomes too complex gets a 400; another request in the batch is
    answered."""

    async def both() -> list[Any]:
        endless = {"grammar": 'start: ("x" | "y") a\na: b\nb: a'}  # fails after its first letter
        requests = [ask(tiny, structured_outputs=endless), ask(tiny, temperature=0)]
        return await asyncio.gather(*requests)

    refused, answered = asyncio.run(both())
    assert refused["status"] == 400
    assert "became too complex" in refused["error"]["error"]["message"]
    assert answered["status"] == 200


def test_a_complete_answer_ends_before_min_tokens(tiny: MixtralServer) -> None:
    """An answer to which its grammar can add nothing ends, also if it is empty."""
    for text in ("ab", ""):
        answer = asyncio.run(ask(tiny, structured_outputs={"regex": text}, min_tokens=40))
        choice = answer["body"]["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_logprobs_are_the_models_own(tiny: MixtralServer) -> None:
    """Log probabilities are of the distribution before the grammar, as without one."""
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}
    extras: tuple[dict[str, Any], ...] = ({}, {"structured_outputs": {"choice": ["x"]}})
    free, bound = (
        asyncio.run(ask(tiny, **how, **extra))["body"]["choices"][0]["logprobs"]["content"]
        for extra in extras
    )
    assert free[0] == bound[0]  # the space that begins every answer
    assert free[1]["top_logprobs"] == bound[1]["top_logprobs"]
    assert free[1]["token"] != bound[1]["token"]
