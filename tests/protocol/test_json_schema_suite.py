"""Grammars beside the official test suite of JSON schema: json-schema-org/JSON-Schema-Test-Suite.

`draft2020-12.json` has the schemas and instances of its folder of that name at commit 44401e0c,
without the schemas that refer to a server.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol.grammar import CompiledGrammar, GrammarState
from serve_app.protocol.grammar_source import GrammarSource
from tests.fakes import tokenizer
from tests.protocol.test_grammar import EOS, allowed, compiled_grammar

SUITE: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "json_schema_suite" / "draft2020-12.json").read_text()
)
UNSUPPORTED = {
    *("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$dynamicAnchor", "not"),
    *("contains", "minContains", "maxContains", "propertyNames", "uniqueItems"),
    *("dependentSchemas", "dependentRequired", "if", "then", "else"),
}
"""Keywords that llguidance does not hold; all others it holds, or refuses a use of them."""


def grammar(schema: Any) -> CompiledGrammar:
    """Returns the grammar of `schema`. Raises `InvalidRequest` if it has none."""
    return compiled_grammar(GrammarSource("json", json.dumps(schema), "response_format"))


def accepts(state: GrammarState, value: Any) -> bool:
    """Returns whether an answer may be this value, written as JSON."""
    text = json.dumps(value, ensure_ascii=False)
    for token_id in tokenizer().encode(text, add_special_tokens=False):
        if token_id not in allowed(state):
            return False
        state.accept(token_id)
    return state.is_complete or EOS in allowed(state)


def held() -> dict[str, Any]:
    """Returns the schemas of the suite that have a grammar."""
    found = {}
    for name, groups in SUITE.items():
        for group in groups:
            try:
                grammar(group["schema"])
            except InvalidRequest:
                continue
            found[f"{name}: {group['description']}"] = group["schema"]
    return found


@pytest.mark.parametrize("name", SUITE)
def test_a_grammar_accepts_no_invalid_instance(name: str) -> None:
    """A schema is a grammar without its invalid instances, or a 400 that names the reason; of the
    valid ones a grammar may lack some, such as those with properties in another order."""
    num_valid = num_accepted = 0
    refusals = []
    for group in SUITE[name]:
        try:
            found = grammar(group["schema"])
        except InvalidRequest as error:
            refusals.append(str(error))
            continue
        for test in group["tests"]:
            is_accepted = accepts(found.start(), test["data"])
            assert test["valid"] or not is_accepted, (group["schema"], test["data"])
            num_valid += test["valid"]
            num_accepted += test["valid"] and is_accepted
    for refusal in refusals:
        if "Unimplemented keys" in refusal:
            assert set(re.findall(r'"([$\w]+)"', refusal)) <= UNSUPPORTED, refusal
    assert num_accepted >= num_valid * 0.7


def test_half_of_the_suite_has_a_grammar() -> None:
    """All schemas that have no keyword from `UNSUPPORTED`, but for rare uses of others."""
    simple = [
        group["schema"]
        for groups in SUITE.values()
        for group in groups
        if not any(f'"{word}"' in json.dumps(group["schema"]) for word in UNSUPPORTED)
    ]
    assert len(held()) >= len(simple) * 0.8
