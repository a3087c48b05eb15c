"""`python -m serve_app.check CONFIG`: says in a sentence what would go wrong, before Ray starts.

Looks at the YAML's schema, the settings, the checkpoint's headers, or the hub's word on it, and at
the memory and disk that it needs. Reads no weights and starts nothing. Does not promise that a
download will succeed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from serve_app.app import DEPLOYMENT
from serve_app.config.settings import ConfigError, Settings, application, unused_names
from serve_app.errors import ModelLoadFailed
from serve_app.loading.model_cache import require_writable
from serve_app.start_plan.memory import in_gb, plan_memory

if TYPE_CHECKING:
    from serve_app.model.config import MixtralConfig
    from serve_app.model.quantization import Quantization

IMPORT_PATH = "serve_app.app:build_app"


def check(path: str | Path) -> list[str]:
    """What will be served and what it takes, a line each.

    Raises `ConfigError` or `ModelLoadFailed` with one sentence at the first thing that cannot work.
    """
    check_schema(path)
    settings = Settings.from_yaml(path)
    told = unused_names()
    return [
        f"{path}: the configuration is valid.",
        *([told] if told else []),
        *check_model(settings),
    ]


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
    if (given := first.get("import_path")) != IMPORT_PATH:
        raise ConfigError(f"{path}: `import_path` must be {IMPORT_PATH}, got {given}.")
    for deployment in first.get("deployments") or []:
        if (given := deployment.get("name")) != DEPLOYMENT:
            raise ConfigError(f"{path}: `deployments`: the only one is {DEPLOYMENT}, got {given}.")


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
    """The checkpoint, here or on the hub, and the memory it takes; lines and errors as in `check`.

    Asks the hub, where the checkpoint is not on this machine; downloads config.json and no more.
    """
    from serve_app.loading.load import find_local, wished_quantization
    from serve_app.model.checkpoint.checkpoint import inspect

    folder = find_local(settings)
    if folder is None:
        return check_remote(settings)
    checkpoint = inspect(folder)
    check_tokenizer(folder)
    quantization = checkpoint.resolve_quantization(
        wished_quantization(settings), settings.model.quantize_lm_head
    )
    if checkpoint.form != "fused":
        require_writable(settings)
    num_files = len(checkpoint.headers)
    return [
        f"{settings.model.name}: {in_gb(checkpoint.file_bytes)} of {checkpoint.form} weights in "
        f"{num_files} file{'s' if num_files > 1 else ''}.",
        *_check_sizes(settings, checkpoint.config, quantization),
    ]


def check_tokenizer(folder: Path) -> None:
    """Reads the tokenizer's files as the start will; errors as in `check`."""
    from tokenizers import Tokenizer

    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if not file.exists():
            raise ModelLoadFailed(f"{file}: is missing.")
        try:
            if file.name == "tokenizer.json":
                Tokenizer.from_file(str(file))
            else:
                json.loads(file.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing more precise
            raise ModelLoadFailed(f"{file}: cannot be read; download it again.") from error


def check_remote(settings: Settings) -> list[str]:
    """What the first start will download, and what it takes then."""
    from serve_app.loading.load import wished_quantization
    from serve_app.model.checkpoint.checkpoint import Checkpoint
    from serve_app.model.checkpoint.find import download_cache
    from serve_app.start_plan.hub import look_up, require_disk

    chosen, hub = settings.model, download_cache(Path(settings.runpod.volume))
    token = chosen.hf_token.get_secret_value() if chosen.hf_token else None
    repository = look_up(chosen.name, chosen.revision, token, hub)
    checkpoint = Checkpoint.from_config(Path(chosen.name), repository.config)
    quantization = checkpoint.resolve_quantization(
        wished_quantization(settings), chosen.quantize_lm_head
    )
    require_disk(chosen.name, repository, hub)
    if checkpoint.form != "fused":
        require_writable(settings)
    return [
        f"{chosen.name}: is not on this machine; the first start downloads "
        f"{in_gb(repository.missing_bytes)}.",
        *_check_sizes(settings, checkpoint.config, quantization),
    ]


def _check_sizes(
    settings: Settings, config: "MixtralConfig", quantization: "Quantization | None"
) -> list[str]:
    from serve_app.model.footprint import parameters
    from serve_app.start_plan.kv_size import max_model_len

    context = max_model_len(settings, config.max_position_embeddings)
    return [
        f"Model: {sum(parameters(config).values()):,} parameters, context {context:,} tokens.",
        *plan_memory(settings, config, quantization, context),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 where all is well, else one sentence on stderr and 1."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.check", description=__doc__)
    parser.add_argument("config", help="the YAML that `serve run` takes")
    parser.add_argument(
        "--load", action="store_true", help="load the model too, try it, and write a report"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mixtral-check.json"), help="where --load writes it"
    )
    options = parser.parse_args(arguments)
    try:
        for line in check(options.config):
            print(line)
        if options.load:
            from serve_app.api import trial

            trial.run(Settings.from_yaml(options.config), options.out)
    except (ConfigError, ModelLoadFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
