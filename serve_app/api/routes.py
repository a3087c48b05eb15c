"""What each route does with its body: read, tokenise, generate, shape the answer.

Knows the engine only through `Generator`, and no doors: refusals are raised as `ServeError`s.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from serve_app.api.generation import Generator
from serve_app.errors import ModelNotFound, ServeError, as_serve_error, error_body
from serve_app.protocol import chat, completions, plain, tokens
from serve_app.protocol.answer import Generation, Head
from serve_app.protocol.call import (
    BatchReply,
    BodyItem,
    Call,
    JsonReply,
    ProgressItem,
    Reply,
    StreamReply,
)
from serve_app.protocol.fields import Body, printable
from serve_app.protocol.values import is_large

log = logging.getLogger(__name__)

T = TypeVar("T")

Handler = Callable[[Call], Awaitable[Reply]]
"""Answers a call."""

PATHS = (
    "/health",
    "/ping",
    "/metrics",
    "/v1/models",
    "/v1/models/{id:path}",
    "/v1/chat/completions",
    "/v1/completions",
    "/prompt",
    "/tokenize",
    "/detokenize",
)
"""Every route there is, as doors may name them."""
MODELS = "/v1/models/"


class Routes:
    """The routes that speak of models and text. `names` are the served names."""

    def __init__(self, generator: Generator, names: tuple[str, ...], max_num_seqs: int) -> None:
        self._generator = generator
        self._tokenizer = generator.tokenizer
        self._names = names
        self._max_running = max_num_seqs
        self._table: dict[str, tuple[str, Handler]] = {
            "/v1/models": ("GET", self._models),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._completions),
            "/prompt": ("POST", self._prompt),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
        }

    def find(self, path: str) -> tuple[str, Handler] | None:
        """The method and the handler of `path`; None where there is no such route."""
        if path.startswith(MODELS) and path != MODELS:
            return "GET", self._model
        return self._table.get(path)

    async def _models(self, call: Call) -> Reply:
        return JsonReply({"object": "list", "data": [self._card(name) for name in self._names]})

    async def _model(self, call: Call) -> Reply:
        name = call.path.removeprefix(MODELS)
        self._require_model(name)
        return JsonReply(self._card(name))

    async def _chat(self, call: Call) -> Reply:
        request = await _read(chat.ChatRequest.read, call.body)
        head = self._head(request, call)
        ids = await self._generator.conversation_ids(request.messages)
        generation = self._generator.start(
            request, ids, "messages", default=None, arrived=call.arrived
        )
        if request.stream:
            return await _streamed(chat.chunks(request, head, generation, self._tokenizer))
        return JsonReply(await chat.answer(request, head, generation, self._tokenizer))

    async def _completions(self, call: Call) -> Reply:
        request = await _read(completions.CompletionRequest.read, call.body)
        head = self._head(request, call)
        places = self._places()
        generations, echoes = [], []
        for prompt in request.prompts:
            await asyncio.sleep(0)  # others have their turn between two prompts
            generation = await self._completion(request, prompt, call)
            if len(request.prompts) > 1:
                generation = generation.in_turn(places)
            generations.append(generation)
            echoes.append(await self._text(prompt) if request.echo else "")
        parts = (request, head, generations, echoes, self._tokenizer)
        if request.stream:
            return await _streamed(completions.chunks(*parts))
        return JsonReply(await completions.answer(*parts))

    async def _completion(
        self, request: completions.CompletionRequest, prompt: str | list[int], call: Call
    ) -> Generation:
        if isinstance(prompt, str):
            ids = await self._generator.text_ids(prompt)
        else:
            self._generator.check_prompt(prompt, "prompt")
            ids = prompt
        return self._generator.start(
            request,
            ids,
            "prompt",
            default=completions.DEFAULT_MAX_TOKENS,
            arrived=call.arrived,
            continues=True,
        )

    async def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return await self._generator.decoded(prompt, "prompt")

    async def _prompt(self, call: Call) -> Reply:
        batch = await _read(plain.batch, call.body)
        if batch is not None:
            return BatchReply(self._prompts(batch, call))
        request = await _read(plain.PromptRequest.read, call.body)
        head = self._head(request, call)
        generation = await self._plain(request, call)
        if request.stream:
            return await _streamed(plain.chunks(head, generation))
        return JsonReply(await plain.answer(head, generation))

    async def _plain(self, request: plain.PromptRequest, call: Call) -> Generation:
        ids = await self._generator.conversation_ids(request.conversation, request.text_field)
        return self._generator.start(
            request,
            ids,
            request.text_field,
            default=plain.DEFAULT_MAX_TOKENS,
            arrived=call.arrived,
        )

    def _places(self) -> asyncio.Semaphore:
        """For one request's prompts: no more at once than can run.

        Else a long list would be refused by its own queue.
        """
        return asyncio.Semaphore(self._max_running)

    async def _prompts(
        self, batch: plain.Batch, call: Call
    ) -> AsyncGenerator[ProgressItem | BodyItem, None]:
        """The items side by side, told one by one as they end; their results are in order."""
        places = self._places()
        total = len(batch.items)
        running = [
            asyncio.create_task(self._item(batch, item, call, places)) for item in batch.items
        ]
        try:
            for num_done, each in enumerate(asyncio.as_completed(running), start=1):
                await each
                yield {"progress": plain.progress(num_done, total)}
            results = [task.result() for task in running]
            yield {"status": 200, "body": {"results": results, "total_processed": total}}
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _item(
        self, batch: plain.Batch, item: Any, call: Call, places: asyncio.Semaphore
    ) -> dict[str, Any]:
        """One item's result; one that fails is an error in its place."""
        async with places:
            await asyncio.sleep(0)  # others have their turn between two items
            try:
                request = await _read(batch.read, item)
                head = self._head(request, call)
                result = await plain.answer(head, await self._plain(request, call))
                return {name: result[name] for name in ("text", "finish_reason", "usage")}
            except Exception as error:
                told = known(error, call.request_id)
                self._generator.metrics.error(told)
                return {**error_body(told, call.request_id)}

    async def _tokenize(self, call: Call) -> Reply:
        request = await _read(tokens.TokenizeRequest.read, call.body)
        self._require_model(request.model)
        if request.messages is not None:
            ids = await self._generator.conversation_ids(
                request.messages, add_generation_prompt=request.add_generation_prompt
            )
        else:
            ids = await self._generator.text_ids(
                request.prompt or "", add_special_tokens=request.add_special_tokens is not False
            )
        strings = None
        if request.return_token_strs:
            strings = [self._tokenizer.token_string(token_id) for token_id in ids]
        return JsonReply(tokens.tokenized(ids, self._generator.max_model_len, strings))

    async def _detokenize(self, call: Call) -> Reply:
        request = await _read(tokens.DetokenizeRequest.read, call.body)
        self._require_model(request.model)
        # As in vLLM, all that was tokenised comes back, special tokens too.
        text = await self._generator.decoded(request.tokens, "tokens", skip_special_tokens=False)
        return JsonReply({"prompt": text})

    def _head(self, request: Body, call: Call) -> Head:
        self._require_model(request.model)
        return Head(call.request_id, self._names[0])

    def _require_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise ModelNotFound(
                f"There is no model `{printable(name)}` here, only {', '.join(self._names)}.",
                param="model",
            )

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "mixtral-serve",
            "max_model_len": self._generator.max_model_len,
        }


async def _streamed(chunks: AsyncGenerator[dict[str, Any], None]) -> StreamReply:
    """Waits for the first response chunk, so that a refusal is raised before the stream begins."""
    return StreamReply(await anext(chunks), chunks)


async def _read(read: Callable[[Any], T], body: Any) -> T:
    """`read(body)`; in a thread where it takes long, so that the event loop does not wait."""
    return await asyncio.to_thread(read, body) if is_large(body) else read(body)


def known(error: Exception, request_id: str) -> ServeError:
    """`error` as a `ServeError`; one that we did not foresee is logged with its traceback."""
    answer = as_serve_error(error)
    if answer is not error:
        # Only where it happened: an exception's text may quote the user.
        log.error("request %s failed: %s", request_id, _where(error))
        log.debug("request %s failed", request_id, exc_info=error)
    return answer


def _where(error: BaseException) -> str:
    """The exception's type and the lines it came through, without its text."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    lines = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in frames[::-1])
    return f"{type(error).__name__} in {lines}"
