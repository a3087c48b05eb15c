"""Conversations in any order become what Mistral's own encoder makes of them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import InvalidRequest, ModelLoadFailed
from serve_app.protocol.chat_template import ChatTemplate
from serve_app.protocol.conversation import Turn, merged
from serve_app.protocol.tokenizer import Tokenizer
from tests import mistral
from tests.fakes import tokenizer

ROLES = {"s": "system", "u": "user", "a": "assistant"}
STRICT = (  # as Mixtral's first template: no system message, and roles that alternate
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "[{{ message['role'] }}: {{ message['content'] }}]{% endfor %}"
)
DEAF = (  # leaves system messages out
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "[{{ message['role'] }}: {{ message['content'] }}]{% endif %}{% endfor %}"
)
LENIENT = (
    "{% for message in messages %}[{{ message['role'] }}: {{ message['content'] }}]{% endfor %}"
)


def conversation(roles: str) -> list[Turn]:
    """Returns a conversation of these roles, whose contents are 0, 1, 2, ..."""
    return [{"role": ROLES[role], "content": str(index)} for index, role in enumerate(roles)]


def rendered(source: str, roles: str) -> str:
    return ChatTemplate(source, {}, Path("t.jinja")).render(conversation(roles))


def has_question(roles: str) -> bool:
    """Returns whether the user says something, which every request needs."""
    return "u" in roles


def is_split_by_system(roles: str) -> bool:
    """Returns whether only system messages stand between two of one role. Mistral leaves them
    apart."""
    return any(one == other for one, other in pairwise(_runs(roles)))


def _runs(roles: str) -> list[str]:
    runs = [role for index, role in enumerate(roles) if index == 0 or roles[index - 1] != role]
    return [role for role in runs if role != "s"]


@given(st.text("sua", min_size=1, max_size=8).filter(has_question))
def test_any_order_has_mistrals_ids(mixtral_tokenizer: Tokenizer, roles: str) -> None:
    """System messages, neighbors of one role and a first answer are merged as Mistral does."""
    ids = mixtral_tokenizer.render(conversation(roles))
    if not is_split_by_system(roles):
        assert ids == mistral.ids(conversation(roles))


@given(st.text("sua", min_size=1, max_size=8).filter(has_question), st.booleans())
def test_merged_turns_alternate_and_lose_nothing(roles: str, keeps_system: bool) -> None:
    """Question, answer, question, ..., and every content is in one of them."""
    turns = merged(conversation(roles), keeps_system=keeps_system)
    names = [turn["role"] for turn in turns]
    assert names.count("system") == (keeps_system and "s" in roles)
    assert "system" not in names[1:]
    spoken = [name for name in names if name != "system"]
    assert spoken == ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2)
    contents = sorted(part for turn in turns for part in turn["content"].split("\n\n") if part)
    assert contents == sorted(str(index) for index in range(len(roles)))


@pytest.mark.parametrize(
    ("source", "roles", "text"),
    [
        (LENIENT, "suusa", "[system: 0][user: 1][user: 2][system: 3][assistant: 4]"),
        (STRICT, "ua", "[user: 0][assistant: 1]"),
        (STRICT, "ssu", "[user: 0\n\n1\n\n2]"),
        (STRICT, "uauu", "[user: 0][assistant: 1][user: 2\n\n3]"),
        (STRICT, "usa", "[user: 1\n\n0][assistant: 2]"),
        (STRICT, "aau", "[user: ][assistant: 0\n\n1][user: 2]"),
        (DEAF, "uu", "[user: 0][user: 1]"),
        (DEAF, "suu", "[user: 0\n\n1\n\n2]"),
    ],
)
def test_the_template_decides_whether_to_merge(source: str, roles: str, text: str) -> None:
    """A conversation that a template accepts is rendered unchanged; otherwise it is merged."""
    assert rendered(source, roles) == text


def test_merging_leaves_the_request_alone() -> None:
    """The messages of the request are not changed."""
    turns = conversation("ssuua")
    tokenizer().render(turns)
    assert turns == conversation("ssuua")


@pytest.mark.parametrize(("index", "length"), [(1, 3), (4, 5), (0, 1), (700, 900)])
def test_a_refusal_names_the_message(index: int, length: int) -> None:
    """`param` is the message with which the template begins to refuse, in its own words."""
    source = (
        "{% for message in messages %}{% if message['content'] == 'bad' %}"
        "{{ raise_exception('Bad words.') }}{% endif %}{{ message['content'] }}{% endfor %}"
    )
    turns = conversation("ua" * length)[:length]
    turns[index] = {**turns[index], "content": "bad"}
    with pytest.raises(InvalidRequest, match="Bad words") as refused:
        ChatTemplate(source, {}, Path("t.jinja")).render(turns)
    assert refused.value.param == f"messages.{index}"
    assert f"`messages.{index}`" in refused.value.message


def test_a_fault_of_the_template_is_named_in_the_error() -> None:
    """A conversation on which the template itself fails is a 400 that names the template."""
    source = "{{ messages[0]['content'] }}{% if messages|length > 2 %}{{ 1 / 0 }}{% endif %}"
    with pytest.raises(InvalidRequest, match=r"ZeroDivisionError.*fault of t\.jinja") as refused:
        rendered(source, "uau")
    assert refused.value.param == "messages.2"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% for m in messages %}{{ m }}", "broken in line 1"),
        ("\n{{ messages | nosuchfilter }}", "broken in line 2"),
        ("{{ raise_exception('Send a system message.') }}", "Send a system message"),
        ("{{ messages[0].content.nosuch.field }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ bos_token }}", "leaves the user's question out"),
    ],
)
def test_a_template_that_does_not_work(source: str, sentence: str) -> None:
    """A template that is broken or refuses one question gives an error with its file and a
    remedy."""
    with pytest.raises(ModelLoadFailed, match=sentence) as failed:
        ChatTemplate(source, {}, Path("t.jinja"))
    assert "t.jinja: its chat template" in failed.value.message
    assert "/v1/completions" in failed.value.message
    assert not failed.value.retry


TEMPLATES = (
    LENIENT,
    "{%- set ns = namespace(last='') %}\n{%- for m in messages %}\n  {%- if loop.last %}\n"
    "    {%- set ns.last = m.content | trim %}\n  {% endif %}\n{%- endfor %}\n"
    "{{ ns.last | tojson }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}"
    "{{ dict(a=m.content)['a'] }}{% if loop.index == 3 %}{% break %}{% endif %}\n{% endfor %}",
    "{% for m in messages %}{% set x = 1 %}{% generation %}{% set x = 2 %}{{ m['content'] }}"
    "{% endgeneration %}{{ x }}{{ bos_token }}{{ eos_token }}{{ pad_token }}{% endfor %}\n",
    "{% macro say(m) -%} <{{ m.role }}> {{ m.content }} {%- endmacro %}{% for m in messages %}"
    "{{ say(m) }}{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ tools is none }}",
    "{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{{ documents is defined }}",
)


@pytest.fixture(scope="module")
def transformers_rendering() -> Any:
    """transformers' rendering of a template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("roles", ["u", "suau", "uauaua"])
@pytest.mark.parametrize("prompts", [True, False])
def test_rendered_text_is_transformers(
    transformers_rendering: Any, source: str, roles: str, prompts: bool
) -> None:
    """Blocks, filters, loops, macros and names of Jinja as Hugging Face's templates use them."""
    turns = [{**turn, "content": f" é<{turn['content']}>\n"} for turn in conversation(roles)]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = transformers_rendering(
        conversations=[turns], chat_template=source, add_generation_prompt=prompts, **tokens
    )
    template = ChatTemplate(source, tokens, Path("t.jinja"))
    assert template.render(turns, add_generation_prompt=prompts) == expected[0]
