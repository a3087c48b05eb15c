"""Bad bodies are refused with the field's name; good ones mean what OpenAI's docs say."""

from typing import Any

import pytest
from anthropic.types import message_count_tokens_params as count_tokens
from anthropic.types import message_create_params as messages
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens
from anthropic.types.beta import message_create_params as beta_messages
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from serve_app.errors import InvalidRequest
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.fields import Body
from serve_app.protocol.messages_api.request import CountTokensRequest, MessagesRequest
from serve_app.protocol.prompt import PromptRequest
from serve_app.protocol.responses_api.request import ResponsesRequest
from serve_app.protocol.tokens import DetokenizeRequest, TokenizeRequest
from serve_app.protocol.unsupported import IGNORED, UNSUPPORTED

NAN = float("nan")
HELLO = [{"role": "user", "content": "Hello"}]


def refusal(schema: type[Body], body: Any) -> InvalidRequest:
    """Returns the error that reading `body` raises."""
    with pytest.raises(InvalidRequest) as refused:
        schema.read(body)
    return refused.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": float("inf")}, "max_tokens"),
        ({"top_p": float("inf")}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
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
        ({"messages": [{"role": "function", "content": "3"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages.0.content"),
        ({"stop": ["a\ud800"]}, "stop.0"),
        ({"model": "a\ud800"}, "model"),
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


@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens", "seed", "min_p"])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_number_that_no_float_can_hold_is_out_of_range(name: str, value: float) -> None:
    """`1e999`, which JSON readers return as an infinity, gives an error that says so."""
    error = refusal(ChatRequest, {"messages": HELLO, name: value})
    assert error.message == f"`{name}` is a number out of range."


@pytest.mark.parametrize("body", [None, [], "Hello", 3, True])
def test_a_body_that_is_no_object(body: Any) -> None:
    """The error asks for a JSON object."""
    assert "JSON object" in refusal(ChatRequest, body).message


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_fields_are_refused_by_name(name: str) -> None:
    """A field of OpenAI's that would change the answer is never silently dropped."""
    error = refusal(TokenizeRequest, {"prompt": "a", name: "anything"})
    assert error.param == name
    is_field = name in TokenizeRequest.model_fields
    assert is_field or f"`{name}` is not supported" in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [], "response_format": {"type": "text"}},
        dict.fromkeys(IGNORED, "anything"),
        dict.fromkeys(UNSUPPORTED),
        {"max_tokens": None, "stop": None, "temperature": None, "logit_bias": None},
        {"n": 1.0, "best_of": None, "length_penalty": 1.0, "use_beam_search": False},
        {"parallel_tool_calls": True, "tool_choice": None, "reasoning_effort": "low"},
        {"prediction": {"type": "content", "content": "Hello"}},
        {"echo": False, "add_generation_prompt": True, "continue_final_message": False},
        {"logprobs": False, "top_logprobs": 0, "top_k": 0, "seed": None},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_special_tokens": False, "mm_processor_kwargs": {}, "vllm_xargs": {}},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(fields: dict[str, Any]) -> None:
    """Neutral values, the ignore list, and nulls change nothing."""
    given, plain = ({"messages": HELLO, **more} for more in (fields, {}))
    assert ChatRequest.read(given).model_dump() == ChatRequest.read(plain).model_dump()


@pytest.mark.parametrize(
    ("schema", "params"),
    [
        (ChatRequest, chat.CompletionCreateParamsStreaming),
        (CompletionRequest, completions.CompletionCreateParamsStreaming),
        (ResponsesRequest, responses.ResponseCreateParamsStreaming),
        (MessagesRequest, messages.MessageCreateParamsStreaming),
        (MessagesRequest, beta_messages.MessageCreateParamsStreaming),
        (CountTokensRequest, count_tokens.MessageCountTokensParams),
        (CountTokensRequest, beta_count_tokens.MessageCountTokensParams),
    ],
)
def test_each_field_of_the_clients_is_known(schema: type[Body], params: Any) -> None:
    """Each field of the clients' own types is used, ignored or refused with a reason; none is
    taken for a misspelt one."""
    fields = params.__required_keys__ | params.__optional_keys__
    aliases = {field.alias for field in schema.model_fields.values()}
    known = schema.model_fields.keys() | aliases | schema.IGNORED | schema.UNSUPPORTED.keys()
    # The client sends it as a header.
    assert fields - known <= {"betas"}
    assert "model" in fields


def test_each_route_takes_vllms_own_default_of_add_special_tokens() -> None:
    """It is true for raw text, which begins with BOS, and false for messages, whose template has
    BOS; the other value would change the prompt and is refused."""
    CompletionRequest.read({"prompt": "a", "add_special_tokens": True})
    error = refusal(CompletionRequest, {"prompt": "a", "add_special_tokens": False})
    assert error.param == "add_special_tokens"
    error = refusal(ChatRequest, {"messages": HELLO, "add_special_tokens": True})
    assert error.param == "add_special_tokens"


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize("value", [True, 0, 1.5, "1", 129])
def test_numbers_of_answers_are_small_integers(name: str, value: Any) -> None:
    """`n` and `best_of` are from 1 to 128, and not true, which equals 1 in Python."""
    assert refusal(ChatRequest, {"messages": HELLO, name: value}).param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 129, "n": 2}, "n"),
        ({"prompt": ["a"] * 86, "n": 2, "best_of": 3}, "best_of"),
    ],
)
def test_numbers_of_answers_fit_together(fields: dict[str, Any], param: str) -> None:
    """The best of fewer, a stream of the best, and more than 256 answers are refused."""
    assert refusal(CompletionRequest, {"prompt": "a", **fields}).param == param


@pytest.mark.parametrize("value", [True, 2, 1.5, "1"])
def test_prompt_has_one_answer(value: Any) -> None:
    """`/prompt` takes the number 1 only."""
    assert refusal(PromptRequest, {"prompt": "a", "n": value}).param == "n"


def test_an_unknown_field_is_named_safely() -> None:
    """A field's own name may be anything: it comes back short and in valid Unicode."""
    error = refusal(ChatRequest, {"messages": HELLO, "\ud800" + "x" * 500: 1})
    assert error.param is not None
    assert len(error.param.encode()) < 100


def test_integers_may_be_written_as_floats() -> None:
    """`16.0` is 16 in every integer field, alone or in a list; `true` and `"16"` are not."""
    fields = ("max_tokens", "min_tokens", "top_k", "seed", "top_logprobs", "max_completion_tokens")
    given = {
        "messages": HELLO,
        "logprobs": True,
        "stop_token_ids": [3.0],
        **dict.fromkeys(fields, 2.0),
    }
    request = ChatRequest.read(given)
    values = [*(getattr(request, name) for name in fields), *request.stop_token_ids]
    assert values == [2, 2, 2, 2, 2, 2, 3]
    assert {type(value) for value in values} == {int}
    assert CompletionRequest.read({"prompt": [1.0, 2.0], "logprobs": 1.0}).prompts == [[1, 2]]
    assert CompletionRequest.read({"prompt": [[1.0], [2]]}).prompts == [[1], [2]]
    assert DetokenizeRequest.read({"tokens": [1.0, 2]}).tokens == [1, 2]
    for wrong in (True, "16", 1.5):
        assert refusal(ChatRequest, {"messages": HELLO, "seed": wrong}).param == "seed"


def test_two_names_of_one_limit_may_agree() -> None:
    """Some clients send `max_tokens` and `max_completion_tokens` with the same value."""
    body = {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 5}
    assert ChatRequest.read(body).limit[0] == 5


@pytest.mark.parametrize("stream", [True, False])
def test_null_in_stream_options_is_absent(stream: bool) -> None:
    """Null inside `stream_options`, and options that ask for nothing, change nothing."""
    names = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    for options in ({}, dict.fromkeys(names), dict.fromkeys(names, False)):
        body = {"messages": HELLO, "stream": stream, "stream_options": options}
        request = ChatRequest.read(body)
        assert not request.stream_options.include_usage
        assert not request.stream_options.continuous_usage_stats


def test_keys_inside_messages_and_parts_are_ignored() -> None:
    """Clients keep their own data in messages and send back every key of an answer."""
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "id": None}
    answer = {"role": "assistant", "content": "a", "reasoning_content": "b", "audio": None}
    user = {"role": "user", "content": [part], "id": 3, "opts": {"visible": True}, "metadata": {}}
    messages = ChatRequest.read({"messages": [user, answer, user]}).messages
    assert [message.content for message in messages] == ["hi", "a", "hi"]


WORKER_VLLM = {
    "n": 1,
    "best_of": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
}
"""The `sampling_params` that RunPod's vLLM worker documents, with their defaults:
https://github.com/runpod-workers/worker-vllm."""


@pytest.mark.parametrize(
    ("schema", "prompt"),
    [
        (ChatRequest, {"messages": HELLO}),
        (CompletionRequest, {"prompt": "a"}),
        (PromptRequest, {"prompt": "a"}),
    ],
)
def test_the_sampling_params_of_worker_vllm_pass(schema: type[Body], prompt: Any) -> None:
    """Its whole table with its defaults asks for nothing but 16 tokens at temperature 1."""
    plain = {**prompt, "max_tokens": 16, "temperature": 1.0, "top_k": -1}
    given = {**prompt, **WORKER_VLLM}
    assert schema.read(given).model_dump() == schema.read(plain).model_dump()


def test_an_earlier_answer_may_have_a_refusal() -> None:
    """OpenAI's clients send back the parts of an answer that they got elsewhere."""
    parts = [{"type": "refusal", "refusal": "No."}]
    turns = [*HELLO, {"role": "assistant", "content": parts}, *HELLO]
    assert ChatRequest.read({"messages": turns}).messages[1].content == "No."


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
    assert [message.model_dump(exclude_defaults=True) for message in messages] == [
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


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], [[]], 3, [1, "a"], [True], [1.5], {}, ["\ud800"]]
)
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
    """`add_special_tokens` with messages, and `add_generation_prompt` with raw text, are refused by
    name."""
    assert refusal(TokenizeRequest, body).param == field


def test_tokenize_takes_what_vllm_takes_by_default() -> None:
    """Messages without more special tokens are what the chat template gives anyway."""
    TokenizeRequest.read({"messages": HELLO, "add_special_tokens": False})


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_fields_are_not_even_looked_at(name: str) -> None:
    """Their values are dropped before anything reads them."""
    body = {"messages": HELLO, name: NAN}
    assert ChatRequest.read(body) == ChatRequest.read({"messages": HELLO})
