"""The handlers of `/tokenize`, `/detokenize` and `/tokenizer_info`."""

from typing import TYPE_CHECKING

from serve_app.protocol import tokens, values
from serve_app.protocol.call import Call, JsonReply, Reply
from serve_app.protocol.tool_request import offered

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel


async def tokenize(served: "ServedModel", call: Call) -> Reply:
    """Returns the token ids of a text or a conversation."""
    request = await values.read(tokens.TokenizeRequest.read, call.body)
    served.check_model(request.model)
    inputs = served.inputs
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
        strings = [served.tokenizer.token_string(token_id) for token_id in ids]
    return JsonReply(tokens.tokenized(ids, inputs.max_model_len, strings))


async def tokenizer_info(served: "ServedModel", call: Call) -> Reply:
    """Returns the tokenizer's configuration, in vLLM's schema."""
    return JsonReply(served.tokenizer.info)


async def detokenize(served: "ServedModel", call: Call) -> Reply:
    """Returns the text of token ids."""
    request = await values.read(tokens.DetokenizeRequest.read, call.body)
    served.check_model(request.model)
    # As in vLLM, the text includes the special tokens.
    text = await served.inputs.text(request.tokens, "tokens", skip_special_tokens=False)
    return JsonReply({"prompt": text})
