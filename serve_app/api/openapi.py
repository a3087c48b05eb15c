"""Creates the document of `/openapi.json` from the route table and the schemas of requests.

Format: https://spec.openapis.org/oas/v3.1.0. The schemas of requests come from pydantic and are
extended by what the routes accept beyond them: a string instead of a list, and ignored fields. The
schema of an answer is inferred from its example.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import serve_app
from serve_app.api.descriptions import DESCRIPTIONS, STATE, TAGS, Description
from serve_app.error_body import error_body
from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.fields import Body
from serve_app.protocol.prompt import LISTS, PromptRequest

if TYPE_CHECKING:
    from serve_app.api.route import Route

ABOUT = (
    "Mixtral 8x7B from one Ray Serve deployment. In a request, null means that a field is absent; "
    "a field that is not listed is refused by its name."
)
REFS = "#/components/schemas/{model}"
NOT_USED = "x-not-used"
"""Marks fields that are accepted if their value requests the default behavior."""

_STRINGS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}
_TEXT = {"type": "string"}
_PARTS = {"type": "array", "items": {"type": "object"}}
_CALL = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": _TEXT},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "function"],
}
WIDER_LISTS: dict[str, JsonObject] = {
    "stop": {"anyOf": [_TEXT, _STRINGS]},
    "prompt": {"anyOf": [_TEXT, _STRINGS, _IDS, {"type": "array", "items": _IDS}]},
    "system": {"anyOf": [_TEXT, _PARTS]},
    "input": {"anyOf": [_TEXT, _PARTS]},
}
"""Properties that are lists after validation, but accept other forms in a request."""
REQUEST_FORMS: dict[str, JsonObject] = {
    "content": {"anyOf": [_TEXT, _PARTS, {"type": "null"}]},
    "tool_calls": {"type": "array", "items": _CALL},
    "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]},
}
"""Properties whose form in a request differs from the form after validation."""
_RENAMED = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
"""pydantic's names of limits, which it leaves in a schema if a type has a validator."""


def document(routes: Sequence["Route"], *, has_keys: bool) -> JsonObject:
    """Returns the whole document. `has_keys` says whether the server requires API keys."""
    descriptions = {
        route.path: DESCRIPTIONS.get(route.path)
        or Description(STATE, inspect.getdoc(route.handler) or route.path, {})
        for route in routes
    }
    paths: dict[str, JsonObject] = {}
    schemas = _schemas(
        [description.request for description in descriptions.values() if description.request]
    )
    for route in routes:
        described = descriptions[route.path]
        path = re.sub(r":path}", "}", route.path)
        operation = _operation(described, path, is_open=not (has_keys and route.needs_key))
        paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mixtral-serve",
            "version": serve_app.__version__,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "."}],
        "tags": [{"name": tag} for tag in TAGS],
        "paths": paths,
        "components": {
            "schemas": {name: schemas[name] for name in sorted(_referred(paths, schemas))},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(described: Description, path: str, *, is_open: bool) -> JsonObject:
    operation: JsonObject = {
        "tags": [described.tag],
        "summary": described.summary,
        "operationId": re.sub(r"\W+", "_", path).strip("_") or "page",
        "responses": _responses(described, path),
        "security": [] if is_open else [{"key": []}],
    }
    if parameters := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _TEXT, "example": "tiny"}
            for name in parameters
        ]
    if described.request is not None:
        schema: JsonObject = {"$ref": REFS.format(model=described.request.__name__)}
        if described.request is PromptRequest:
            schema = {"anyOf": [schema, {"$ref": REFS.format(model="PromptList")}]}
        content = {"schema": schema, "example": described.body}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return operation


def _responses(described: Description, path: str) -> JsonObject:
    answer = {"schema": schema_of(described.answer), "example": described.answer}
    content: JsonObject = {described.media_type: answer}
    if described.request is not None and "stream" in described.request.model_fields:
        content["text/event-stream"] = {"schema": _TEXT}
    failure = error_body(InvalidRequest("`prompt` is required.", param="prompt"), "6f0c", path)
    error = {"schema": schema_of(failure), "example": failure}
    return {
        "200": {"description": "The answer.", "content": content},
        "default": {"description": "An error.", "content": {"application/json": error}},
    }


def schema_of(example: Any) -> JsonObject:
    """Returns the JSON schema of values like `example`; null in it means any value."""
    match example:
        case dict():
            properties = {name: schema_of(value) for name, value in example.items()}
            return {"type": "object", "properties": properties, "required": list(example)}
        case list():
            return {"type": "array", "items": schema_of(example[0]) if example else {}}
        case str():
            return _TEXT
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer"}
        case float():
            return {"type": "number"}
    return {}


def _schemas(models: Sequence[type[BaseModel]]) -> JsonObject:
    _, generated = models_json_schema(
        [(model, "validation") for model in models], ref_template=REFS
    )
    schemas: JsonObject = _tidied(generated["$defs"])
    for model in models:
        schema = schemas[model.__name__]
        docs = _field_docs(model)
        for name, field in model.model_fields.items():
            if name in docs:
                schema["properties"][field.alias or name]["description"] = docs[name]
        if issubclass(model, Body):
            schema["properties"] |= _not_used(model)
    schemas["PromptList"] = _prompt_list(schemas["PromptRequest"])
    return schemas


def _referred(value: Any, schemas: JsonObject) -> set[str]:
    """Returns the names of the schemas that `value` refers to, directly or through another one."""
    names: set[str] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
        elif isinstance(node, str) and node.startswith(REFS.format(model="")):
            name = node.rpartition("/")[2]
            if name not in names:
                names.add(name)
                waiting.append(schemas[name])
    return names


def _tidied(schema: Any) -> Any:
    """Returns pydantic's schema with JSON Schema's names, without titles and null."""
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidied = {_RENAMED.get(name, name): _tidied(value) for name, value in schema.items()}
    if isinstance(tidied.get("title"), str):
        del tidied["title"]
    if "default" in tidied and tidied["default"] is None:
        del tidied["default"]
    choices = [item for item in tidied.get("anyOf", ()) if item != {"type": "null"}]
    if len(choices) == 1:
        del tidied["anyOf"]
        tidied = choices[0] | tidied
    if isinstance(properties := tidied.get("properties"), dict):
        for name, definition in properties.items():
            if name in REQUEST_FORMS or (name in WIDER_LISTS and definition.get("type") == "array"):
                documentation = (
                    {"description": definition["description"]}
                    if "description" in definition
                    else {}
                )
                properties[name] = (REQUEST_FORMS | WIDER_LISTS)[name] | documentation
    return tidied


def _not_used(model: type[Body]) -> JsonObject:
    """Returns the fields that are accepted but have no effect, with the accepted values."""
    ignored: JsonObject = {name: {NOT_USED: True} for name in sorted(model.IGNORED)}
    for name, (values, reason) in sorted(model.UNSUPPORTED.items()):
        if name not in {field.alias or key for key, field in model.model_fields.items()}:
            ignored[name] = {"enum": [*values, None], "description": reason, NOT_USED: True}
    return ignored


def _prompt_list(prompt: JsonObject) -> JsonObject:
    """Returns the schema of a list of prompts; its other fields are those of a single prompt."""
    item = {"anyOf": [_TEXT, {"$ref": REFS.format(model="PromptRequest")}]}
    single = ("prompt", "messages", *LISTS)
    shared = {name: value for name, value in prompt["properties"].items() if name not in single}
    lists = {name: {"type": "array", "items": item} for name in LISTS}
    return {
        "type": "object",
        "description": "A list of prompts, or of `PromptRequest`s, with fields that all share.",
        "properties": lists | shared,
        "anyOf": [{"required": [name]} for name in LISTS],
        "additionalProperties": False,
    }


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Returns the docstrings below the fields of `model` and its bases, by the field's name."""
    docs: dict[str, str] = {}
    for cls in model.__mro__:
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs.setdefault(name, " ".join(text.split()))
    return docs
