"""Finds the folder of a model on this machine by its name, without network access.

Repository names are compared without case, because RunPod's model cache has them in lower case.
"""

import json
import os
import re
from pathlib import Path

from serve_app.errors import ModelLoadFailed
from serve_app.machine.volume import SERVERLESS
from serve_app.model.checkpoint.shards import INDEX, SINGLE

RUNPOD_CACHE = Path("/runpod/cache")
SMALL_FILES = ("tokenizer*", "*.jinja", "*.json")
"""Files beside the weights that belong to a model."""
NEEDED = (("config.json",), ("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",))
"""Files beside the weights that every model needs: one of each group."""


def find_local(name: str, revision: str | None = None, *, volume: Path = SERVERLESS) -> Path | None:
    """Returns the folder of `name` on this machine; None if it must be downloaded.

    Raises `ModelLoadFailed` if `name` is neither a folder here nor the name of a repository, and if
    this user lacks the permission to read a path.
    """
    try:
        return _find(name, revision, volume)
    except PermissionError as error:
        raise ModelLoadFailed(
            f"{error.filename}: user {os.getuid()} may not read this path; give it to that user, "
            "or let every user read it."
        ) from None


def _find(name: str, revision: str | None, volume: Path) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelLoadFailed(f"{name}: this is a file, but `model.name` must name a folder.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name[0] in "./":
        raise ModelLoadFailed(
            f"{name}: there is no such folder; `model.name` is a folder, or a repository as "
            "'owner/name'."
        )
    from huggingface_hub.constants import HF_HUB_CACHE

    for hub in (hub_cache(volume), hub_cache(SERVERLESS), Path(HF_HUB_CACHE)):
        if cached := cached_snapshot(hub, name, revision):
            return cached
    cached = RUNPOD_CACHE / name / (revision or "main")
    return cached if _is_downloaded(cached) else None


def hub_cache(volume: Path) -> Path:
    """Returns the Hugging Face cache on a volume."""
    return volume / "huggingface-cache" / "hub"


def cached_snapshot(hub: Path, name: str, revision: str | None) -> Path | None:
    """Returns the complete snapshot of repository `name` in the Hugging Face cache `hub`, or
    None."""
    folder_name = f"models--{name.replace('/', '--')}".lower()
    if not hub.is_dir():
        return None
    for repository in sorted(hub.iterdir()):
        if repository.name.lower() != folder_name:
            continue
        reference = repository / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        snapshots = repository / "snapshots"
        candidates = [snapshots / commit] if commit else list(snapshots.glob("*"))
        # If there are several snapshots, only the hub knows the default branch.
        if len(candidates) == 1 and _is_downloaded(candidates[0]):
            return candidates[0]
    return None


def _is_downloaded(folder: Path) -> bool:
    """Returns True if a download would add nothing."""
    has_needed = all(any((folder / name).exists() for name in names) for names in NEEDED)
    return is_complete(folder) and has_needed


def is_complete(folder: Path) -> bool:
    """Returns True if the configuration and every safetensors file exist."""
    if not (folder / "config.json").exists():
        return False
    if (folder / SINGLE).exists():
        return True
    index = folder / INDEX
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError):
        return False
    return all((folder / name).exists() for name in names)
