"""The response object of `/v1/responses`, in each of its states."""

from typing import Literal

from serve_app.errors import Overloaded, ServeError
from serve_app.protocol.call import JsonObject
from serve_app.protocol.response import ResponseMetadata, TokenNames
from serve_app.protocol.responses_api.request import ResponsesRequest
from serve_app.protocol.scores import named
from serve_app.protocol.text import TextDelta
from serve_app.protocol.tools import ToolCall, joined

Status = Literal["in_progress", "completed", "incomplete"]


def body(
    request: ResponsesRequest,
    metadata: ResponseMetadata,
    num_input_tokens: int,
    names: TokenNames,
    whole: TextDelta,
) -> JsonObject:
    """Returns the whole answer as a response. The tokens of calls have no log probabilities."""
    calls = joined(whole.tool_calls)
    output: list[JsonObject] = []
    if whole.text or not calls:
        end = len(whole.text)
        scores = [score for score in whole.scores if not calls or score.offset < end]
        part = output_text(whole.text, named(scores, request.top_logprobs, names))
        output.append(message(metadata, "completed", [part]))
    output += [function_call(call, "completed") for call in calls]
    output[-1]["status"] = status_of(whole)
    return ended(begun(request, metadata), output, num_input_tokens, whole)


def begun(request: ResponsesRequest, metadata: ResponseMetadata) -> JsonObject:
    """Returns the response before the answer, with fields of the request."""
    text = {"format": {"type": "text"}} | request.text.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{metadata.id}",
        "object": "response",
        "created_at": metadata.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata,
        "model": metadata.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": None,
        "temperature": request.temperature,
        "text": text,
        "tool_choice": request.tool_choice,
        "tools": [tool.model_dump() for tool in request.tools],
        "top_logprobs": request.top_logprobs,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def ended(
    response: JsonObject, output: list[JsonObject], num_input_tokens: int, end: TextDelta
) -> JsonObject:
    """Returns `response` with its output, status and usage."""
    status = status_of(end)
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    usage = {
        "input_tokens": num_input_tokens,
        "input_tokens_details": {"cached_tokens": end.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": end.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input_tokens + end.num_tokens,
    }
    return {
        **response,
        "status": status,
        "incomplete_details": details,
        "output": output,
        "usage": usage,
    }


def failed(response: JsonObject, output: list[JsonObject], error: ServeError) -> JsonObject:
    """Returns `response` with the output so far, and the error that ended it."""
    code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
    fields = {"code": code, "message": error.message}
    return {**response, "status": "failed", "output": output, "error": fields}


def status_of(end: TextDelta) -> Status:
    """Returns the status of a response that has ended, and of its last item."""
    return "incomplete" if end.finish_reason == "length" else "completed"


def message(metadata: ResponseMetadata, status: Status, content: list[JsonObject]) -> JsonObject:
    """Returns the item with the answer's text."""
    return {
        "id": f"msg_{metadata.id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def function_call(call: ToolCall, status: Status) -> JsonObject:
    """Returns the item with a call."""
    return {
        "id": f"fc_{call.id.removeprefix('call_')}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


def output_text(text: str, logprobs: list[JsonObject]) -> JsonObject:
    """Returns the content part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
