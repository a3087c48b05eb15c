"""llm, the command and the library: an OpenAI-compatible model from its YAML file."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from benchmarks.clients.features import Server, feature, main, run_command
from benchmarks.clients.weather import SCHEMA, TEXT, Weather, get_weather, valid

OPTIONS = ("-o", "max_tokens", "64", "-o", "temperature", "0")
FORCED = ("-o", "tool_choice", "required")


def set_up(server: Server) -> None:
    """Writes the files that `llm` reads: its extra models and its keys."""
    folder = Path(os.environ["HOME"]) / "llm"
    folder.mkdir(exist_ok=True)
    common = {"model_name": server.model, "api_base": server.v1, "api_key_name": "mixtral"}
    models = [
        common | {"model_id": "chat", "supports_tools": True, "supports_schema": True},
        common | {"model_id": "text", "completion": True},
        common | {"model_id": "responses", "responses": True, "supports_schema": True},
    ]
    (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    (folder / "keys.json").write_text(json.dumps({"mixtral": server.key}))
    os.environ["LLM_USER_PATH"] = str(folder)


def library_model(server: Server, name: str = "chat") -> Any:
    set_up(server)
    import llm  # reads the models' file when it is first used

    return llm.get_model(name)


@feature
def prompt(server: Server) -> None:
    set_up(server)
    assert run_command("llm", "-m", "chat", "-s", "Be short.", *OPTIONS, TEXT).strip()


@feature
def prompt_without_stream(server: Server) -> None:
    set_up(server)
    assert run_command("llm", "-m", "chat", "--no-stream", *OPTIONS, TEXT).strip()


@feature
def conversation(server: Server) -> None:
    set_up(server)
    run_command("llm", "-m", "chat", *OPTIONS, TEXT)
    assert run_command("llm", "-c", *OPTIONS, "And in London?").strip()
    logged = json.loads(run_command("llm", "logs", "--json", "-n", "1"))
    assert logged[0]["prompt"] == "And in London?"


@feature
def schema(server: Server) -> None:
    set_up(server)
    answer = run_command("llm", "-m", "chat", "--schema", json.dumps(SCHEMA), "--no-stream", TEXT)
    valid(answer)


@feature
def text_completion(server: Server) -> None:
    set_up(server)
    assert run_command("llm", "-m", "text", *OPTIONS, "The capital").strip()


@feature
def responses(server: Server) -> None:
    set_up(server)
    assert run_command("llm", "-m", "responses", TEXT).strip()


@feature
def library_schema(server: Server) -> None:
    response = library_model(server).prompt(TEXT, schema=Weather, max_tokens=200)
    valid(response.text())
    assert response.usage().output > 0


@feature
def tools(server: Server) -> None:
    response = library_model(server).prompt(TEXT, tools=[get_weather], max_tokens=100)
    assert response.text() or response.tool_calls()


if __name__ == "__main__":
    main()
