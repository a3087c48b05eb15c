"""Bad bodies are refused with the field's name; good ones mean what OpenAI's docs say."""

from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.fields import IGNORED, UNSUPPORTED, Body
from serve_app.protocol.prompt import PromptRequest
from serve_app.protocol.tokens import TokenizeRequest

NAN = float("nan")
HELLO = [{"role": "user", "content": "Hello"}]


def refusal(schema: type[Body], body: Any) -> InvalidRequest:
    """The error that reading `body` raises."""
    with pytest.raises(InvalidRequest) as refused:
        schema.read(body)
    return refused.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": float("inf")}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"max_completion_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"007": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"topk": 3}, "topk"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 4097}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "system", "content": "Be short."}]}, "messages"),
        ({"messages": ["Hello"]}, "messages.0"),
        ({"messages": [*HELLO, "Hello"]}, "messages.1"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"content": "Hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages"),
        ({"messages": [{**HELLO[0], "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        (
            {"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.1.content",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages.0.content"),
    ],
)
def test_a_bad_chat_request_names_the_field(fields: dict[str, Any], param: str) -> None:
    """One sentence, and `param` is the field that must change."""
    error = refusal(ChatRequest, {"messages": HELLO, **fields})
    assert error.param == param
    assert error.message.endswith(".")


def test_what_is_no_json_is_said_to_be_none() -> None:
    """A NaN, which equals nothing, is refused as NaN, not as an unsupported value."""
    assert "not JSON" in refusal(ChatRequest, {"messages": HELLO, "temperature": NAN}).message


@pytest.mark.parametrize("body", [None, [], "Hello", 3, True])
def test_a_body_that_is_no_object(body: Any) -> None:
    """The error asks for a JSON object."""
    assert "JSON object" in refusal(ChatRequest, body).message


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_fields_are_refused_by_name(name: str) -> None:
    """A field of OpenAI's that would change the answer is never silently dropped."""
    error = refusal(ChatRequest, {"messages": HELLO, name: "anything"})
    assert (error.param, f"`{name}` is not supported" in error.message) == (name, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        dict.fromkeys(IGNORED, "anything"),
        dict.fromkeys(UNSUPPORTED),
        {"max_tokens": None, "stop": None, "temperature": None, "logit_bias": None},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(fields: dict[str, Any]) -> None:
    """Neutral values, the ignore list, and nulls change nothing."""
    assert ChatRequest.read({"messages": HELLO, **fields}) == ChatRequest.read({"messages": HELLO})


@pytest.mark.parametrize(("name", "value"), [("n", True), ("n", 2), ("best_of", 1.0)])
def test_only_one_answer(name: str, value: Any) -> None:
    """`n` may be the integer 1 only: neither 2, nor true, which equals 1 in Python."""
    assert refusal(ChatRequest, {"messages": HELLO, name: value}).param == name


def test_an_unknown_field_is_named_safely() -> None:
    """A field's own name may be anything: it comes back short and in valid Unicode."""
    error = refusal(ChatRequest, {"messages": HELLO, "\ud800" + "x" * 500: 1})
    assert error.param is not None
    assert len(error.param.encode()) < 100


def test_messages_as_clients_send_them() -> None:
    """Text parts are joined, developer is system, and an earlier answer's nulls are dropped."""
    answer = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "c"}]
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": parts, "name": "Ann"},
        {**answer, "annotations": []},
    ]
    messages = ChatRequest.read({"messages": turns}).messages
    assert [message.model_dump() for message in messages] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a\nc"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hello", ["Hello"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_forms_of_a_completions_prompt(prompt: Any, prompts: list[Any]) -> None:
    """A string, strings, token ids, lists of token ids."""
    assert CompletionRequest.read({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize("prompt", [None, "", [], [""], [[]], 3, [1, "a"], [True], [1.5], {}])
def test_no_other_prompt(prompt: Any) -> None:
    """Anything else, and anything empty, is refused by the field's name."""
    assert refusal(CompletionRequest, {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "Be short."}]}, "messages"),
        ({"prompt": "a", "messages": HELLO}, "messages"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
    ],
)
def test_a_bad_plain_request_names_the_field(body: dict[str, Any], param: str) -> None:
    """`/prompt` takes a prompt or messages, not both and not neither."""
    assert refusal(PromptRequest, body).param == param


def test_tokenize_takes_text_or_messages() -> None:
    """Exactly one of `prompt` and `messages` must be given."""
    assert refusal(TokenizeRequest, {}).param == "prompt"
    assert refusal(TokenizeRequest, {"prompt": "a", "messages": HELLO}).param == "prompt"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_tokenize_refuses_what_it_would_not_do(body: Any, field: str) -> None:
    """BOS belongs to raw text and the generation prompt to messages; the other is no silence."""
    assert refusal(TokenizeRequest, body).param == field


def test_tokenize_takes_what_vllm_takes_by_default() -> None:
    """Messages without more special tokens are what the chat template gives anyway."""
    TokenizeRequest.read({"messages": HELLO, "add_special_tokens": False})


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_fields_are_not_even_looked_at(name: str) -> None:
    """Their values are dropped before anything reads them."""
    body = {"messages": HELLO, name: NAN}
    assert ChatRequest.read(body) == ChatRequest.read({"messages": HELLO})
