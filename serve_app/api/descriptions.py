"""Descriptions of the routes for `/openapi.json`: a summary, the request's schema, and examples."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from serve_app.api import status
from serve_app.protocol.call import JsonObject
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.messages_api.request import CountTokensRequest, MessagesRequest
from serve_app.protocol.prompt import PromptRequest
from serve_app.protocol.responses_api.request import ResponsesRequest
from serve_app.protocol.tokens import DetokenizeRequest, TokenizeRequest

GENERATION, MODELS, TOKENS, STATE = "Generation", "Models", "Tokens", "State"
TAGS = (GENERATION, MODELS, TOKENS, STATE)
"""The groups of routes, in the order of `/docs`."""


@dataclass(frozen=True, slots=True)
class Description:
    """The description of one route. The schema of its answer is inferred from the example
    `answer`."""

    tag: str
    summary: str
    answer: Any
    """A JSON object, or the text of another media type."""
    request: type[BaseModel] | None = None
    body: JsonObject | None = None
    """An example of a request."""
    media_type: str = "application/json"


_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
_PARIS = "The capital of France is Paris."
_USAGE = {"prompt_tokens": 11, "completion_tokens": 8, "total_tokens": 19}
_DETAILED_USAGE = {**_USAGE, "prompt_tokens_details": {"cached_tokens": 0}}
_CREATED = 1795910400
_CARD = {
    "id": "tiny",
    "object": "model",
    "created": _CREATED,
    "owned_by": "mixtral-serve",
    "max_model_len": 16384,
}

DESCRIPTIONS: dict[str, Description] = {
    "/v1/chat/completions": Description(
        GENERATION,
        "The next message of a conversation (OpenAI's chat completions).",
        {
            "id": "chatcmpl-6f0c",
            "object": "chat.completion",
            "created": _CREATED,
            "model": "tiny",
            "system_fingerprint": "fp_3b1f0c9a2e",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": _PARIS, "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _DETAILED_USAGE,
        },
        ChatRequest,
        {"messages": _QUESTION, "max_tokens": 64, "temperature": 0},
    ),
    "/v1/completions": Description(
        GENERATION,
        "The continuation of raw text, for one prompt or several (OpenAI's completions).",
        {
            "id": "cmpl-6f0c",
            "object": "text_completion",
            "created": _CREATED,
            "model": "tiny",
            "system_fingerprint": "fp_3b1f0c9a2e",
            "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
            "usage": _DETAILED_USAGE,
        },
        CompletionRequest,
        {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
    ),
    "/v1/responses": Description(
        GENERATION,
        "The answer to input items (OpenAI's Responses, without state).",
        {
            "id": "resp_6f0c",
            "object": "response",
            "created_at": _CREATED,
            "status": "completed",
            "model": "tiny",
            "output": [
                {
                    "id": "msg_6f0c",
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": [
                        {
                            "type": "output_text",
                            "text": _PARIS,
                            "annotations": [],
                            "logprobs": [],
                        }
                    ],
                }
            ],
            "usage": {"input_tokens": 11, "output_tokens": 8, "total_tokens": 19},
        },
        ResponsesRequest,
        {"input": "What is the capital of France?", "max_output_tokens": 64},
    ),
    "/v1/messages": Description(
        GENERATION,
        "The next message of a conversation (Anthropic's Messages).",
        {
            "id": "msg_6f0c",
            "type": "message",
            "role": "assistant",
            "model": "tiny",
            "content": [{"type": "text", "text": _PARIS}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 11, "output_tokens": 8},
        },
        MessagesRequest,
        {"messages": _QUESTION, "max_tokens": 64},
    ),
    "/v1/messages/count_tokens": Description(
        TOKENS,
        "The number of tokens of a prompt for `/v1/messages`.",
        {"input_tokens": 11},
        CountTokensRequest,
        {"messages": _QUESTION},
    ),
    "/prompt": Description(
        GENERATION,
        "The answer to one prompt or conversation, or to a list of them.",
        {"text": _PARIS, "finish_reason": "stop", "usage": _USAGE, "model": "tiny"},
        PromptRequest,
        {"prompt": "What is the capital of France?", "temperature": 0},
    ),
    "/tokenize": Description(
        TOKENS,
        "The token ids of a text or a conversation (vLLM's schema).",
        {"count": 2, "max_model_len": 16384, "tokens": [1, 437], "token_strs": None},
        TokenizeRequest,
        {"prompt": "Hello"},
    ),
    "/detokenize": Description(
        TOKENS,
        "The text of token ids (vLLM's schema).",
        {"prompt": "<s>Hello"},
        DetokenizeRequest,
        {"tokens": [1, 437]},
    ),
    "/tokenizer_info": Description(
        TOKENS,
        "The tokenizer's configuration, with the chat template.",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    status.MODELS: Description(
        MODELS, "The models that are served.", {"object": "list", "data": [_CARD]}
    ),
    f"{status.MODELS}/{{id:path}}": Description(MODELS, "One model that is served.", _CARD),
    "/version": Description(MODELS, "The version of the server.", {"version": "0.1.0"}),
    "/health": Description(
        STATE,
        "The full state: memory by part, KV blocks, load phases, and notes on automatic choices. "
        "503 while the server drains.",
        {
            "status": "ready",
            "model": {"id": "tiny", "quantization": "nf4", "dtype": "float32"},
            "memory": {
                "experts": 1253376,
                "attention": 104448,
                "head": 786432,
                "other": 4215360,
                "kv_cache": 134217728,
            },
            "engine": {"running": 0, "waiting": 0, "kv_blocks_used": 0, "kv_blocks_total": 4096},
            "load": [{"phase": "read and quantize", "seconds": 0.967}],
            "notes": ["experts and attention in nf4, absmax bfloat16"],
        },
    ),
    "/ping": Description(
        STATE, "Only the status, for load balancers. 503 while draining.", {"status": "ready"}
    ),
    "/metrics": Description(
        STATE,
        "Prometheus' text: latencies, tokens, queue, KV blocks, errors.",
        'mixtral_num_requests_running{model_name="tiny"} 0.0\n',
        media_type="text/plain",
    ),
    "/": Description(
        STATE, "A page to try the model.", "<!doctype html>...", media_type="text/html"
    ),
    "/docs": Description(
        STATE, "A page that describes the routes.", "<!doctype html>...", media_type="text/html"
    ),
    "/openapi.json": Description(
        STATE, "OpenAPI's description of all routes, which `/docs` shows.", {"openapi": "3.1.0"}
    ),
}
"""The descriptions by path in `routes.ROUTES`."""
