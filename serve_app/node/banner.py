"""The first lines of a server's log: the model, the machine and the limits, one fact per line.

There are few lines, because RunPod drops lines of a log that grows fast. They contain no secrets.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import serve_app
from serve_app.api.routes import ROUTES
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.machine.gpus import MIB, NoGpus, query_gpus
from serve_app.machine.ports import LOOPBACK
from serve_app.machine.volume import (
    is_mounted,
    nearest_existing,
    volume_folder,
    write_problem,
)

RULE = "=" * 72


def banner(
    settings: Settings,
    config: str | Path,
    slots: int | None,
    checked: list[str],
    failure: ModelLoadFailed | None = None,
) -> list[str]:
    """Returns the lines of the banner.

    `checked` are the lines of the check. `slots` is the maximum number of concurrent jobs; None for
    an HTTP server. `failure` is the error of the check, if the model cannot be loaded.
    """
    model, engine, api = settings.model, settings.engine, settings.api
    revision = f" at {model.revision}" if model.revision else ""
    names = ", ".join(model.served_model_names)
    is_now = slots is None or settings.runpod.start == "eager"
    outlook = f"The model loads {'now' if is_now else 'with the first job'}."
    return [
        RULE,
        f"Starting the {'HTTP server' if slots is None else 'RunPod worker'} of mixtral-serve "
        f"{serve_app.__version__}, {config}",
        RULE,
        f"Model: {model.name}{revision}, served as {names}",
        f"Quantization: {model.quantization}",
        f"Device: {model.device}, dtype {model.dtype}",
        *checked,
        f"Volume: {volume(volume_folder(settings.runpod.volume))}",
        f"GPU: {gpu()}",
        f"Endpoints: {', '.join(route.path for route in ROUTES)}",
        f"GPU memory threshold: {engine.gpu_memory_utilization:.0%} of the card",
        f"Prompt limit: {api.max_prompt_chars:,} characters",
        f"Body limit: {api.max_body_bytes:,} bytes",
        f"Time limit: {api.request_timeout_s:.0f} s per request",
        f"Concurrency: {'any number of requests' if slots is None else f'{slots} jobs'}, "
        f"{engine.max_num_seqs} of them decoding at once",
        outlook if failure is None else f"The model cannot be loaded: {failure}",
        RULE,
    ]


def volume(folder: Path) -> str:
    """Returns a phrase about the network volume: whether it is mounted and can be written."""
    if not is_mounted(folder):
        return f"none is mounted at {folder}; downloads are lost when this container ends"
    free_gb = shutil.disk_usage(nearest_existing(folder)).free / 1e9
    access = write_problem(folder) or "it can be written"
    return f"{folder} is mounted, {free_gb:.0f} GB free; {access}"


def gpu() -> str:
    """Returns the name, memory and driver of each GPU, or the reason why none is found."""
    try:
        gpus = query_gpus()
    except NoGpus as reason:
        return f"none ({reason})"
    return "; ".join(
        f"{gpu.name}, {gpu.total_bytes // MIB} MiB, driver {gpu.driver}" for gpu in gpus
    )


def exposure(options: dict[str, Any], settings: Settings) -> tuple[int, str]:
    """Returns a logging level and a sentence that says who can send requests to the server."""
    host, port = options["host"], options["port"]
    needs_key = settings.api.needs_key
    if host.startswith(LOOPBACK):
        key = "one of the API keys" if needs_key else "no API key"
        return logging.INFO, f"Requests: from this machine only ({host}), with {key}."
    if needs_key:
        return logging.INFO, (
            f"Requests: from every machine that reaches {host}:{port}, with one of the API keys; "
            "/health, /ping and /metrics need none."
        )
    return logging.WARNING, (
        f"Requests: from every machine that reaches {host}:{port}, WITHOUT an API key. Set "
        "API_KEYS in the environment, or `http_options.host: 127.0.0.1` in the configuration."
    )
