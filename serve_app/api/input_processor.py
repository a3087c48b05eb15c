"""InputProcessor: converts a validated request to token ids, sampling parameters and `Answer`s."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from serve_app.api.answer import Answer
from serve_app.api.metrics.metrics import Metrics
from serve_app.api.tracing import AnswerTrace, Tracing
from serve_app.config.api_settings import ApiSettings
from serve_app.engine.admission import check_token_ids
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduling_class import SchedulingClass
from serve_app.engine.sequence import SharedPrompt
from serve_app.errors import InvalidRequest
from serve_app.protocol import tool_grammar
from serve_app.protocol.call import Call
from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.field_errors import printable
from serve_app.protocol.fields import Sampling
from serve_app.protocol.grammar import GrammarCompiler
from serve_app.protocol.messages import Message
from serve_app.protocol.text import TextStream
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.protocol.tool_calls import ToolCallParser
from serve_app.protocol.tool_prompt import num_chars as num_chars_with_tools
from serve_app.protocol.tools import Tools

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine

T = TypeVar("T")

MAX_CHARS_ON_LOOP = 4_000
"""Texts with more characters are tokenized in a thread, so that the event loop does not wait. The
same limit applies to the number of token ids in detokenizing."""

CHARS_PER_MESSAGE = 20
"""Rendering one message takes about as long as tokenizing this number of characters."""


@dataclass(frozen=True, slots=True)
class InputProcessor:
    """Tokenizes prompts and creates answers for one engine."""

    engine: "Engine"
    tokenizer: Tokenizer
    settings: ApiSettings
    max_model_len: int
    """Maximum number of tokens of prompt and answer together."""
    vocab_size: int
    metrics: Metrics
    grammars: GrammarCompiler
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of sampling fields by name. `max_tokens` also limits every request, as in vLLM."""
    tracing: Tracing | None = None

    async def chat_ids(
        self,
        messages: list[Message],
        field: str = "messages",
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Tools | None = None,
    ) -> list[int]:
        """Returns the token ids of a conversation with its tools, rendered by the chat template.

        With `continue_final_message` the ids end with the last message's text. Raises
        `InvalidRequest` with param `field` for a text that is too long, and for messages that the
        template refuses.
        """
        if tools is not None or any(
            message.tool_calls or message.role == "tool" for message in messages
        ):
            prompt_tools = () if tools is None or tools.choice.mode == "none" else tools.tools
            num_chars = num_chars_with_tools(messages, prompt_tools)
            render = partial(self.tokenizer.render_with_tools, messages, prompt_tools)
        else:
            num_chars = sum(len(message.content) for message in messages)
            turns = [{"role": message.role, "content": message.content} for message in messages]
            render = partial(self.tokenizer.render, turns)
        if num_chars > self.settings.max_prompt_chars:
            raise self._too_long(num_chars, field)
        options = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
        }
        if num_chars + CHARS_PER_MESSAGE * len(messages) <= MAX_CHARS_ON_LOOP:
            return render(**options)
        return await asyncio.to_thread(render, **options)

    async def text_ids(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of raw text.

        Raises `InvalidRequest` for a text that is too long.
        """
        if len(prompt) > self.settings.max_prompt_chars:
            raise self._too_long(len(prompt), "prompt")
        encode = self.tokenizer.encode
        if len(prompt) <= MAX_CHARS_ON_LOOP:
            return encode(prompt, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode, prompt, add_special_tokens=add_special_tokens)

    async def text(
        self, token_ids: Sequence[int], field: str, *, skip_special_tokens: bool = True
    ) -> str:
        """Returns the text of a client's token ids. Raises `InvalidRequest` with param `field`."""
        check_token_ids(token_ids, self.vocab_size, field)
        decode = self.tokenizer.decode
        if len(token_ids) <= MAX_CHARS_ON_LOOP:
            return decode(token_ids, skip_special_tokens=skip_special_tokens)
        return await asyncio.to_thread(decode, token_ids, skip_special_tokens=skip_special_tokens)

    async def answers(
        self,
        call: Call,
        request: Sampling,
        prompt_ids: list[int],
        field: str,
        *,
        count: int = 1,
        num_logprobs: int | None = None,
        num_prompt_logprobs: int | None = None,
        default_max_tokens: int | None = None,
        continues: bool = False,
        tools: Tools | None = None,
    ) -> list[Answer]:
        """Returns `count` answers to a prompt.

        `field` names the request field that contains the prompt. With a seed, answer i has the
        seed + i (as in vLLM). `num_logprobs` and `num_prompt_logprobs` are fields of
        `SamplingParams`. If the request has no limit, an answer has up to `default_max_tokens`
        tokens, or as many as the context holds. With `continues`, the answer continues the prompt's
        text, so a space at its beginning is kept. Answers may call `tools`.

        Raises `InvalidRequest` for a token of the tokenizer that the model does not have, and for a
        grammar that cannot be compiled. The engine checks token ids and context length when it
        starts an answer; with `continues` they are checked here, so that no answer starts if one of
        several prompts is invalid.
        """
        if prompt_ids and max(prompt_ids) >= self.vocab_size:
            self._refuse_unknown_token(prompt_ids, field)
        params = self._params(request, len(prompt_ids), field, default_max_tokens, num_logprobs)
        source = request.grammar
        if tools is not None:
            source = tool_grammar.source(tools, source)
        if source is not None:
            grammar = await self.grammars.compiled(source, begins_text=not continues)
            params = replace(params, grammar=grammar.with_stops(params.stop_token_ids))
        if continues:
            self.engine.check(prompt_ids, params)
        if num_prompt_logprobs is not None:
            params = replace(params, prompt_logprobs=num_prompt_logprobs)
        # An answer that scores its prompt computes the whole prompt itself.
        is_shared = count > 1 and num_prompt_logprobs is None
        shared_prompt = SharedPrompt() if is_shared else None
        called = [] if tools is None else [tool.name for tool in tools.callable]
        scheduling_class = SchedulingClass("", request.priority)
        if (account := call.account) is not None:
            priority = max(request.priority, account.key.min_priority)
            scheduling_class = SchedulingClass(account.group, priority)
        answers = []
        for index in range(count):
            if index and params.seed is not None:
                params = replace(params, seed=params.seed + 1)
            detokenizer = Detokenizer(
                self.tokenizer.backend,
                prompt_ids=prompt_ids if continues else (),
                skip_special=request.skip_special_tokens,
                tool_calls_id=self.tokenizer.tool_calls_id if called else None,
            )
            text = TextStream(
                detokenizer,
                request.stop,
                min_tokens=request.min_tokens,
                tool_calls=ToolCallParser(called) if called else None,
            )
            answers.append(
                Answer(
                    self.engine,
                    prompt_ids,
                    params,
                    text,
                    self.metrics,
                    call.arrived,
                    call.arrived + self.settings.request_timeout_s,
                    scheduling_class,
                    call.account,
                    shared_prompt,
                    None
                    if self.tracing is None
                    else AnswerTrace(self.tracing, call, params, len(prompt_ids)),
                )
            )
        return answers

    def _params(
        self,
        request: Sampling,
        num_prompt_tokens: int,
        field: str,
        default: int | None,
        num_logprobs: int | None,
    ) -> SamplingParams:
        if self.defaults:
            fixed = request.model_fields_set | request.OWN_DEFAULTS | {"max_tokens"}
            unset = self.defaults.keys() - fixed
            request = request.model_copy(update={name: self.defaults[name] for name in unset})
        max_tokens, max_tokens_field = request.limit
        max_allowed = self.settings.max_tokens_limit
        if max_tokens is None:
            room = max(1, self.max_model_len - num_prompt_tokens)
            max_tokens = min(room, default or room, max_allowed or room)
        elif max_allowed is not None and max_tokens > max_allowed:
            raise InvalidRequest(
                f"`{max_tokens_field}` may be {max_allowed} at most.", param=max_tokens_field
            )
        return SamplingParams(
            max_tokens=min(max_tokens, self.defaults.get("max_tokens", max_tokens)),
            min_tokens=min(request.min_tokens, max_tokens),
            temperature=request.temperature if request.top_p else 0.0,
            top_p=request.top_p or 1.0,
            top_k=max(request.top_k, 0),
            min_p=request.min_p,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias={int(token): bias for token, bias in request.logit_bias.items()},
            stop_token_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=num_logprobs,
            prompt_field=field,
            max_tokens_field=max_tokens_field,
        )

    def _too_long(self, num_chars: int, field: str) -> InvalidRequest:
        return InvalidRequest(
            f"`{field}` has {num_chars} characters; {self.settings.max_prompt_chars} are allowed.",
            param=field,
        )

    def _refuse_unknown_token(self, prompt_ids: list[int], field: str) -> None:
        """Raises `InvalidRequest` for a token that the tokenizer has but the model does not.

        The engine refuses ids that are unknown to both.
        """
        if (token := self.tokenizer.first_unknown(prompt_ids, self.vocab_size)) is not None:
            raise InvalidRequest(
                f"`{field}` contains `{printable(token)}`, a token that the tokenizer has and the "
                f"model does not: its vocabulary has {self.vocab_size} tokens. Leave it out.",
                param=field,
            )
