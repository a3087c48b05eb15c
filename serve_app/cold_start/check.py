"""Finds errors that would make a start fail, before Ray starts: `mixtral-serve check CONFIG`.

Checks the YAML's schema, the settings, the headers of the weight files or the hub's description of
them, the tokenizer and its chat template, the memory and the disk. Reads no weights and starts
nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from serve_app.app import check_schema
from serve_app.config.key_file import read_keys
from serve_app.config.serve_config import unused_keys
from serve_app.config.settings import ConfigError, Settings, unused_names, with_variables
from serve_app.errors import ModelLoadFailed
from serve_app.loading.generation import read_generation
from serve_app.loading.load import load_tokenizer
from serve_app.machine import own_folder
from serve_app.model.footprint import parameters
from serve_app.start_plan.hub import require_disk
from serve_app.start_plan.machine_fit import require_memory
from serve_app.start_plan.memory import in_gb
from serve_app.start_plan.plan import StartPlan, plan_start


class Checked(NamedTuple):
    """A configuration that can be started."""

    settings: Settings
    plan: StartPlan
    lines: list[str]
    """Lines for users about the served model and the resources that it needs."""


def check(path: str | Path) -> Checked:
    """Checks the configuration in file `path`.

    Raises `ConfigError` or `ModelLoadFailed` with one sentence about the first problem.
    """
    return check_start(path, check_config(path))


def check_config(path: str | Path) -> Settings:
    """Returns the settings in file `path`. Raises `ConfigError` for a wrong key or value."""
    check_schema(path)
    settings = Settings.from_yaml(path)
    if settings.api.keys_file is not None:
        read_keys(Path(settings.api.keys_file).expanduser())
    return settings


def check_start(path: str | Path, settings: Settings) -> Checked:
    """Plans the start and checks that this machine can run it. Raises the errors of `check`."""
    own_folder.require_writable()
    with _variables_named():
        plan = plan_start(settings)
        about_plan = check_plan(settings, plan)
    lines = [f"{path}: the configuration is valid."]
    if unused := unused_keys(path):
        keys = ", ".join(f"`{key}`" for key in unused)
        lines.append(f"{keys}: only `serve run` uses this; `mixtral-serve run` and RunPod do not.")
    if notice := unused_names():
        lines.append(notice)
    return Checked(settings, plan, [*lines, *about_plan])


@contextmanager
def _variables_named() -> Iterator[None]:
    """Adds to an error the environment variables of the settings that it names."""
    try:
        yield
    except (ConfigError, ModelLoadFailed) as error:
        message = with_variables(str(error))
        error.args = (message,)
        if isinstance(error, ModelLoadFailed):
            error.message = message
        raise


def check_plan(settings: Settings, plan: StartPlan) -> list[str]:
    """Returns lines about the files that `plan` reads and the resources that it needs.

    Raises `ModelLoadFailed` if the plan cannot work.
    """
    name, checkpoint = settings.model.name, plan.checkpoint
    notes: list[str] = []
    if plan.repository is not None:
        require_disk(plan.repository)
        size = in_gb(plan.repository.missing_bytes)
        source = f"{name}: not on this machine; the first start downloads {size}."
    else:
        tokenizer = load_tokenizer(settings, plan)
        generation = read_generation(checkpoint, tokenizer, settings.model.generation_config)
        notes = [*(f"Tokenizer: {note}" for note in tokenizer.notes), *generation.notes]
        num_files = len(plan.files)
        source = (
            f"{name}: {in_gb(checkpoint.file_bytes)} of {checkpoint.form} weights in {num_files} "
            f"file{'s' if num_files > 1 else ''}."
        )
    return [
        source,
        f"Model: {sum(parameters(checkpoint.config).values()):,} parameters, context "
        f"{plan.memory.max_model_len:,} tokens.",
        *(f"{note[:1].upper()}{note[1:]}." for note in (*checkpoint.notes(), *notes)),
        *require_memory(plan),
    ]
