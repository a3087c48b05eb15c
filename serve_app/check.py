"""`python -m serve_app.check CONFIG`: says in a sentence what would go wrong, before Ray starts.

Looks at the YAML's schema, the settings, the checkpoint's headers and the memory it needs. Reads no
weights and starts nothing. Does not promise that a download will succeed.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ModelLoadFailed
from serve_app.settings import ConfigError, Settings, application

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(path: str | Path) -> list[str]:
    """What will be served and what it takes, a line each.

    Raises `ConfigError` or `ModelLoadFailed` with one sentence at the first thing that cannot work.
    """
    check_schema(path)
    settings = Settings.from_yaml(path)
    return [f"{path}: the configuration is valid.", *check_model(settings)]


def check_schema(path: str | Path) -> None:
    """Serve's own schema of the file, so that a key which Serve would refuse is named."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    application(path)  # says it better when the file is no Serve config at all
    document: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: `{key}`: {first['msg']}.") from None


def check_model(settings: Settings) -> list[str]:
    """The checkpoint's files, and the memory it takes; lines and errors as in `check`."""
    from serve_app.load import find_local, require_possible
    from serve_app.model.checkpoint import inspect

    require_possible(settings)
    name = settings.model.name
    folder = find_local(settings)
    if folder is None:
        return [f"{name}: is not on this machine; the first start downloads it."]
    plan = inspect(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / file).exists():
            raise ModelLoadFailed(f"{folder / file}: is missing.")
    trained = plan.config.max_position_embeddings
    context = settings.engine.max_model_len or trained
    if context > trained:
        raise ConfigError(
            f"`engine.max_model_len` is {context}, but the checkpoint holds {trained} tokens."
        )
    return [f"{name}: {sum(plan.parameters.values()):,} parameters, context {context:,} tokens."]


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 where all is well, else one sentence on stderr and 1."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.check", description=__doc__)
    parser.add_argument("config", help="the YAML that `serve run` takes")
    config = parser.parse_args(arguments).config
    try:
        for line in check(config):
            print(line)
    except (ConfigError, ModelLoadFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
