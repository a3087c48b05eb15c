"""Fifty sets of tools: some as real servers and clients describe them, and random ones."""

import inspect
import random
from typing import Any

import openai.types.chat
import pydantic

Tools = list[dict[str, Any]]


def function(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    """Returns a tool in OpenAI's form."""
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


_TEXT = {"type": "string"}
_PATH = {"type": "string", "description": "A path below the root."}
REAL: list[Tools] = [
    [
        function(
            "get_weather",
            _object(
                ["location", "unit"],
                location={"type": "string", "description": "City and country"},
                unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
            )
            | {"additionalProperties": False},
            strict=True,
        )
    ],
    [function("now"), function("utc_now", {}), function("today", {"type": "object"})],
    [
        function("read_file", _object(["path"], path=_PATH, head={"type": "integer"})),
        function(
            "edit_file",
            _object(
                ["path", "edits"],
                path=_PATH,
                edits={
                    "type": "array",
                    "items": _object(["oldText", "newText"], oldText=_TEXT, newText=_TEXT),
                    "maxItems": 3,
                },
                dryRun={"type": "boolean", "default": False},
            )
            | {"$schema": "http://json-schema.org/draft-07/schema#"},
        ),
        function("list_allowed_directories", _object([])),
    ],
    [
        function(
            "search_issues",
            _object(
                ["q"],
                q=_TEXT,
                sort={"type": ["string", "null"], "enum": ["comments", "created", None]},
                order={"anyOf": [{"const": "asc"}, {"const": "desc"}]},
                perPage={"type": "number", "minimum": 1, "maximum": 100},
            ),
        ),
        function(
            "create_issue",
            _object(["title"], title=_TEXT, labels={"type": "array", "items": _TEXT}),
        ),
    ],
    [
        function(
            "browser_click",
            _object(
                ["ref"],
                ref={"type": "string", "pattern": "^e[0-9]{1,4}$"},
                double={"type": "boolean"},
            ),
        ),
        function("browser_navigate", _object(["url"], url={"type": "string", "format": "uri"})),
    ],
    [
        function(
            "final_answer",
            {
                "$defs": {"Step": _object(["text"], text=_TEXT, next={"$ref": "#/$defs/Step"})},
                **_object(
                    ["steps"],
                    steps={"type": "array", "items": {"$ref": "#/$defs/Step"}, "maxItems": 2},
                ),
            },
        )
    ],
    [
        function(
            "think", {"anyOf": [_object(["a"], a=_TEXT), _object(["b"], b={"type": "integer"})]}
        )
    ],
    [
        function(f"tool-{index}", _object([f"x{index}"], **{f"x{index}": {"const": index}}))
        for index in range(40)
    ],
]


def _models() -> list[Tools]:
    """Pydantic's schemas of the openai package's own classes, two to a set."""
    found = [
        function(name, kind.model_json_schema(), description=kind.__doc__)
        for name, kind in inspect.getmembers(openai.types.chat, inspect.isclass)
        if issubclass(kind, pydantic.BaseModel) and kind.model_json_schema().get("type") == "object"
    ]
    return [found[start : start + 2] for start in range(0, len(found), 2)][:20]


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """Returns a random schema."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern"]
    match rng.choice([*kinds, *(["array", "object", "anyOf"] if depth else [])]):
        case "enum":
            return {"enum": [rng.choice(["a", 'b"', "ü", 1, 2.5, None, True]) for _ in range(3)]}
        case "pattern":
            return {
                "type": "string",
                "pattern": rng.choice(["^[a-c]{2,5}$", "^x+$", "^[0-9]-[A-Z]$"]),
            }
        case "integer":
            return {
                "type": "integer",
                "minimum": rng.randint(-9, 0),
                "maximum": rng.randint(1, 999),
            }
        case "array":
            return {
                "type": "array",
                "items": _schema(rng, depth - 1),
                "maxItems": rng.randint(1, 3),
            }
        case "object":
            return _parameters(rng, depth - 1)
        case "anyOf":
            return {"anyOf": [_schema(rng, depth - 1) for _ in range(2)]}
        case kind:
            return {"type": kind}


def _parameters(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b_c", "d-e", "f g", "ü", 'q"'], rng.randint(0, 4))
    required = [name for name in names if rng.random() < 0.7]
    schema = _object(required, **{name: _schema(rng, depth) for name in names})
    return schema if rng.random() < 0.7 else {**schema, "additionalProperties": False}


def _random(seed: int) -> Tools:
    rng = random.Random(seed)
    return [function(f"f{index}", _parameters(rng, 2)) for index in range(rng.randint(1, 5))]


def tool_sets() -> list[Tools]:
    """Returns all of them."""
    fixed = REAL + _models()
    return fixed + [_random(seed) for seed in range(50 - len(fixed))]
