"""The handlers of `/tokenize`, `/detokenize` and `/tokenizer_info`."""

from typing import TYPE_CHECKING

from serve_app.protocol import tokens, values
from serve_app.protocol.call import Call, JsonReply, Reply
from serve_app.protocol.tool_request import offered

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer


async def tokenize(server: "MixtralServer", call: Call) -> Reply:
    """Returns the token ids of a text or a conversation."""
    request = await values.read(tokens.TokenizeRequest.read, call.body)
    server.check_model(request.model)
    inputs = server.inputs
    if request.messages is not None:
        ids = await inputs.chat_ids(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=offered(request.tools, None, is_parallel=True),
        )
    else:
        ids = await inputs.text_ids(
            request.prompt or "", add_special_tokens=request.add_special_tokens is not False
        )
    strings = None
    if request.return_token_strs:
        strings = [server.tokenizer.token_string(token_id) for token_id in ids]
    return JsonReply(tokens.tokenized(ids, inputs.max_model_len, strings))


async def tokenizer_info(server: "MixtralServer", call: Call) -> Reply:
    """Returns the tokenizer's configuration, in vLLM's schema."""
    return JsonReply(server.tokenizer.info)


async def detokenize(server: "MixtralServer", call: Call) -> Reply:
    """Returns the text of token ids."""
    request = await values.read(tokens.DetokenizeRequest.read, call.body)
    server.check_model(request.model)
    # As in vLLM, the text includes the special tokens.
    text = await server.inputs.text(request.tokens, "tokens", skip_special_tokens=False)
    return JsonReply({"prompt": text})
