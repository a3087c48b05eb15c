"""The effect of `tool_choice` and `parallel_tool_calls` on the tiny Mixtral."""

import asyncio
import json
from typing import Any

from serve_app.api.server import MixtralServer
from tests.api.test_structured_outputs import CLOSING
from tests.api.tool_requests import (
    NONE,
    NOW,
    WEATHER,
    ask,
    calls,
    items,
)


def test_auto_is_the_default_and_may_answer_in_text(tiny: MixtralServer) -> None:
    """Without `tool_choice` the model may answer in text, which no grammar changes."""
    free = ask(tiny, tools=[WEATHER])
    assert free["message"]["content"]
    assert "tool_calls" not in free["message"]
    assert free["finish_reason"] == "stop"
    assert free == ask(tiny, tools=[WEATHER], tool_choice="auto")


def test_stop_tokens_end_a_free_answer_with_tools(tiny: MixtralServer) -> None:
    """`stop_token_ids` may be control tokens, which text with tools has not."""
    how: dict[str, Any] = {"logit_bias": {"0": 100}, "stop_token_ids": [0]}
    choice = ask(tiny, tools=[WEATHER], **how)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert calls(ask(tiny, tools=[WEATHER], tool_choice="required", **how, max_tokens=60))


def test_none_does_not_call_and_one_call_is_one(tiny: MixtralServer) -> None:
    """`none` leaves the prompt and the answer as they are without tools; without parallel calls
    there is exactly one."""
    (plain,), (none,) = (
        asyncio.run(items(tiny, **fields)) for fields in ({}, {"tools": [WEATHER], **NONE})
    )
    assert {**none["body"], "created": 0} == {**plain["body"], "created": 0}
    more = {str(tiny.tokenizer.encode(",", add_special_tokens=False)[-1]): 50}
    how: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "logit_bias": more}
    assert len(calls(ask(tiny, **how, parallel_tool_calls=False))) == 1
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert len(calls(ask(tiny, **{**how, "tools": [NOW, WEATHER], "tool_choice": named}))) == 1


def test_allowed_tools_are_the_only_ones_that_are_called(tiny: MixtralServer) -> None:
    """OpenAI's `allowed_tools` calls none of the others."""
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    found = calls(ask(tiny, tools=[WEATHER, NOW], tool_choice=choice, logit_bias=CLOSING))
    assert {name for name, _ in found} == {"now"}


def test_mistrals_any_means_required(tiny: MixtralServer) -> None:
    """`tool_choice: "any"`, which Mistral's API has, gives the answer of `required`."""
    any_call, required = (
        calls(ask(tiny, tools=[WEATHER, NOW], tool_choice=choice, logit_bias=CLOSING))
        for choice in ("any", "required")
    )
    assert any_call == required != []


def test_text_follows_its_own_format_beside_tools(tiny: MixtralServer) -> None:
    """With `response_format` and tools, an answer without a call follows the format."""
    schema = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for tool_choice in ("auto", "none"):
        brace = {str(tiny.tokenizer.encode("{", add_special_tokens=False)[-1]): 100}
        how: dict[str, Any] = {"tool_choice": tool_choice, "logit_bias": brace | CLOSING}
        choice = ask(tiny, tools=[WEATHER], response_format=form, **how)
        assert json.loads(choice["message"]["content"])["x"] == 1
    assert calls(ask(tiny, tools=[NOW], response_format=form, tool_choice="required"))
