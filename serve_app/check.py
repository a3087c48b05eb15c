"""`python -m serve_app.check CONFIG`: says in a sentence what would go wrong, before Ray starts.

Looks at the YAML's schema, the settings, the checkpoint's headers and the memory it needs. Reads no
weights and starts nothing. Does not promise that a download will succeed.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from serve_app.errors import ModelLoadFailed
from serve_app.settings import ConfigError, Settings, application

if TYPE_CHECKING:
    from serve_app.model.checkpoint import Plan

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(path: str | Path) -> list[str]:
    """What will be served and what it takes, a line each.

    Raises `ConfigError` or `ModelLoadFailed` with one sentence at the first thing that cannot work.
    """
    check_schema(path)
    settings = Settings.from_yaml(path)
    return [f"{path}: the configuration is valid.", *check_model(settings)]


def check_schema(path: str | Path) -> None:
    """Serve's own schema of the file; besides, names keys that Serve would ignore in silence."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    first = application(path)  # says it better when the file is no Serve config at all
    document: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise ConfigError(f"{path}: `{key}`: {wrong['msg']}.") from None
    for name in _unknown_keys(document, first):
        raise ConfigError(f"{path}: `{name}` is no key that Serve knows.")


def _unknown_keys(document: dict[str, Any], application: dict[str, Any]) -> Iterator[str]:
    from ray.serve import schema

    levels = [
        ("", document, schema.ServeDeploySchema),
        ("http_options.", document.get("http_options"), schema.HTTPOptionsSchema),
        ("applications.0.", application, schema.ServeApplicationSchema),
    ]
    for i, deployment in enumerate(application.get("deployments") or []):
        where, actor = f"applications.0.deployments.{i}.", deployment.get("ray_actor_options")
        levels += [(where, deployment, schema.DeploymentSchema)]
        levels += [(f"{where}ray_actor_options.", actor, schema.RayActorOptionsSchema)]
    for where, given, known in levels:
        yield from (f"{where}{key}" for key in given or {} if key not in known.model_fields)


def check_model(settings: Settings) -> list[str]:
    """The checkpoint's files, and the memory it takes; lines and errors as in `check`."""
    from serve_app.load import find_local, max_model_len
    from serve_app.model.checkpoint import inspect

    name = settings.model.name
    folder = find_local(settings)
    if folder is None:
        return [f"{name}: is not on this machine; the first start downloads it."]
    plan = inspect(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / file).exists():
            raise ModelLoadFailed(f"{folder / file}: is missing.")
    context = max_model_len(settings, plan.config.max_position_embeddings)
    num_parameters = sum(plan.parameters.values())
    return [
        f"{name}: {num_parameters:,} parameters, context {context:,} tokens.",
        *check_memory(settings, plan, context),
    ]


def check_memory(settings: Settings, plan: "Plan", context: int) -> list[str]:
    """What weights and KV cache take, compared with a CPU's free memory; as in `check`."""
    on_cpu = settings.model.device == "cpu"
    dtype = settings.model.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    weights = sum(plan.weight_bytes(ITEM_BYTES[dtype]).values())
    num_tokens = settings.engine.kv_cache_tokens or (4 * context if on_cpu else None)
    if num_tokens is None:
        return [f"Memory: {weights / 1e9:.2f} GB of {dtype} weights; the rest is for the KV cache."]
    kv_cache = num_tokens * plan.config.kv_values_per_token * ITEM_BYTES[dtype]
    if on_cpu and weights + kv_cache > (free := _free_bytes()):
        raise ModelLoadFailed(
            f"The model needs {(weights + kv_cache) / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; lower `engine.kv_cache_tokens`."
        )
    return [
        f"Memory: {weights / 1e9:.2f} GB of {dtype} weights and {kv_cache / 1e9:.2f} GB for "
        f"{num_tokens:,} tokens of KV cache."
    ]


def _free_bytes() -> int:
    """What new processes can have without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable line; this needs Linux.")


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
