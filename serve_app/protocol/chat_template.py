"""ChatTemplate: renders a conversation as the text of a prompt, with the checkpoint's template.

Templates are Jinja programs for transformers' `apply_chat_template`. They run in the same
environment here: a sandbox with the same variables and functions.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import InvalidRequest, ModelLoadFailed
from serve_app.protocol.conversation import Turn, merged

if TYPE_CHECKING:
    from jinja2 import Environment

log = logging.getLogger(__name__)

_REMEDY = "mend it, or remove it: then only /v1/completions answers"
_TRIAL = "Hello"
_TRIAL_SYSTEM = "Goodbye"


class ChatTemplate:
    """A template that can render at least one user message.

    Thread-safe, because an instance never changes.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], file: Path) -> None:
        """Compiles the template from `file`, and renders a trial conversation.

        `special_tokens` are the template's variables, such as `bos_token`. Raises `ModelLoadFailed`
        if the template is broken or refuses the trial.
        """
        from jinja2 import nodes
        from jinja2.exceptions import TemplateSyntaxError

        self._file = file
        environment = _environment()
        try:
            tree = environment.parse(source)
            template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelLoadFailed(
                f"{file}: its chat template is broken in line {error.lineno} "
                f"({error.message}); {_REMEDY}."
            ) from error
        self._fill = partial(template.render, tools=None, documents=None, **special_tokens)
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.literals = "\0".join(texts)
        """The literal texts of the template."""
        self._try()
        self.takes_system = self._shows_system()
        """Whether the template renders system messages."""

    def render(self, messages: Sequence[Turn], *, add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation.

        If the template refuses a conversation, the result of `merged` is rendered. Raises
        `InvalidRequest` if the template refuses this too; `param` is the message, such as
        `messages.2`.
        """
        if self.takes_system or not any(message["role"] == "system" for message in messages):
            try:
                return self._fill(messages=messages, add_generation_prompt=add_generation_prompt)
            except Exception:
                pass  # if the merged conversation fails too, its error is raised below
        try:
            return self._merged(messages, add_generation_prompt)
        except _Refused as refused:
            index = self._first_refused(messages)
            if refused.__cause__ is not None:
                kind = type(refused.__cause__).__name__
                log.warning(
                    "%s: the chat template failed to render a conversation (%s)", self._file, kind
                )
            raise InvalidRequest(
                f"The model's chat template does not take `messages.{index}`: {refused}",
                param=f"messages.{index}",
            ) from None

    def _merged(self, messages: Sequence[Turn], add_generation_prompt: bool) -> str:
        """Returns the text of a conversation after `merged`. Raises `_Refused`."""
        return self._filled(merged(messages, keeps_system=self.takes_system), add_generation_prompt)

    def _filled(self, messages: Sequence[Turn], add_generation_prompt: bool) -> str:
        """Renders `messages`. Raises `_Refused`."""
        from jinja2.exceptions import TemplateError

        try:
            return self._fill(messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            # `raise_exception` raises this class, and Jinja its subclasses.
            if type(error) is TemplateError:
                raise _Refused(f"{error}") from None
            raise _Refused(
                f"it fails ({type(error).__name__}), which is a fault of {self._file.name}."
            ) from error

    def _first_refused(self, messages: Sequence[Turn]) -> int:
        """Returns the index of the first message with which the template refuses the
        conversation."""
        accepted, refused = 0, len(messages)
        while refused - accepted > 1:
            middle = (accepted + refused) // 2
            try:
                self._merged(messages[:middle], add_generation_prompt=False)
                accepted = middle
            except _Refused:
                refused = middle
        return accepted

    def _try(self) -> None:
        """Raises `ModelLoadFailed` if the template does not render a single user message with its
        text."""
        try:
            text = self._filled([{"role": "user", "content": _TRIAL}], True)
        except _Refused as refused:
            raise ModelLoadFailed(
                f"{self._file}: its chat template does not take a single question: {refused} "
                f"{_REMEDY.capitalize()}."
            ) from refused.__cause__
        if _TRIAL not in text:
            raise ModelLoadFailed(
                f"{self._file}: its chat template leaves the user's question out; {_REMEDY}."
            )

    def _shows_system(self) -> bool:
        turns = [
            {"role": "system", "content": _TRIAL_SYSTEM},
            {"role": "user", "content": _TRIAL},
        ]
        try:
            return _TRIAL_SYSTEM in self._filled(turns, True)
        except _Refused:
            return False


def cut_behind(text: str, content: str) -> str:
    """Returns `text`, a rendered conversation, up to the end of its last message `content`.

    This is the rule of transformers' `continue_final_message`. Example: with the content "Paris is"
    the text "[INST] Hi [/INST] Paris is</s>" loses its "</s>". Spaces at the end of the content are
    kept if the template keeps them. Raises `InvalidRequest` for an empty message, and if the
    template omits the message.
    """
    stripped = content.strip()
    start = text.rfind(stripped) if stripped else -1
    if start < 0:
        raise InvalidRequest(
            "`continue_final_message` needs a last message whose text is in the prompt.",
            param="continue_final_message",
        )
    # Templates may strip the spaces at the end of a message.
    has_spaces = text[start:].startswith(content.lstrip())
    return text[: start + len(content.lstrip() if has_spaces else stripped)]


class _Refused(Exception):
    """The template does not render a conversation. The text is the reason, for users.

    The cause is the template's own failure; None if the template refuses the conversation
    explicitly.
    """


def _environment() -> "Environment":
    """Returns the Jinja environment of transformers' `apply_chat_template`."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `{% generation %}`, which marks an assistant's text for training and has no
        effect here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
