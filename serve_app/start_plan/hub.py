"""A checkpoint on the Hugging Face hub: how large it is, and its download.

Says before the first large file whether the disk holds it. Knows nothing of folders of our own.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from serve_app.errors import MachineUnfit, ModelLoadFailed
from serve_app.model.checkpoint.find import RUNPOD_VOLUME, download_cache, find_local
from serve_app.model.checkpoint.shards import INDEX, SINGLE

FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
"""What we read of a repository; never pickles."""
NEEDED = ["config.json", "tokenizer.json", "tokenizer_config.json"]
"""Without these no model is served, whatever its weights."""
SECOND_COPIES = ["consolidated*"]
"""The same weights again under other names."""

Progress = Callable[[float, int], None]
"""Called with how much of a download is done, from 0 to 1, and the bytes of all of it."""


def find_checkpoint(
    name: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    volume: Path = RUNPOD_VOLUME,
) -> Path:
    """The folder of `name`: a local folder, or a Hugging Face repository "owner/name".

    A repository comes from the first of: `volume`'s and RunPod's model caches, the Hugging Face
    cache, a download (onto `volume` when it is there and writable). `revision` is a branch, tag or
    commit, None the default branch; `token` opens gated repositories.
    Raises `ModelLoadFailed`, with `retry` where another try may help.
    """
    if (found := find_local(name, revision, volume=volume)) is not None:
        return found
    return download(name, revision, token, download_cache(volume))


@dataclass(frozen=True)
class Repository:
    """What the hub says of one revision."""

    commit: str
    config: dict[str, Any]
    """The parsed config.json."""
    nbytes: int
    """Of all files that we read."""
    missing_bytes: int
    """Of those that the cache does not have yet."""


def look_up(name: str, revision: str | None, token: str | None, hub: Path | None) -> Repository:
    """Asks the hub for repository `name`; downloads config.json into the cache `hub`.

    None is the default branch, no token, the Hugging Face cache.
    Raises `ModelLoadFailed` as `download` does, and without a download where a file is not there.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.hf_api import RepoFile

    with _refusals(name, revision):
        api = HfApi(token=token)
        commit = api.repo_info(name, revision=revision).sha or revision or "main"
        sizes = {
            file.path: file.size
            for file in api.list_repo_tree(name, revision=commit)
            if isinstance(file, RepoFile) and _is_read(file.path)
        }
        _require_servable(name, sizes)
        config = hf_hub_download(name, "config.json", revision=commit, token=token, cache_dir=hub)
        missing = sum(
            size
            for path, size in sizes.items()
            if not isinstance(try_to_load_from_cache(name, path, hub, commit), str)
        )
    try:
        document = json.loads(Path(config).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ModelLoadFailed(f"{name}: config.json holds no JSON object.")
    return Repository(commit, document, sum(sizes.values()), missing)


def require_disk(name: str, repository: Repository, hub: Path | None) -> None:
    """Raises `MachineUnfit` unless the disk of the cache `hub` holds what is missing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = hub or Path(HF_HUB_CACHE)
    half_done = cache / f"models--{name.replace('/', '--')}" / "blobs"
    begun = sum(file.stat().st_size for file in half_done.glob("*.incomplete"))
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if repository.missing_bytes - begun > free:
        raise MachineUnfit(
            f"{name}: the download takes {(repository.missing_bytes - begun) / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free in {cache}; make room, or set HF_HOME to another disk.",
            check="disk",
        )


def download(
    name: str,
    revision: str | None,
    token: str | None,
    hub: Path | None,
    progress: Progress | None = None,
) -> Path:
    """Downloads repository `name` into the cache `hub`, going on where an earlier try ended.

    A terminal sees a bar. Raises `ModelLoadFailed`, with `retry` where another try may help.
    """
    from huggingface_hub import snapshot_download

    repository = look_up(name, revision, token, hub)
    require_disk(name, repository, hub)
    with _refusals(name, revision):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=hub,
                allow_patterns=FILES,
                ignore_patterns=SECOND_COPIES,
                tqdm_class=progress and _telling(progress, repository.missing_bytes),
            )
        )


def _telling(progress: Progress, total: int) -> type[Any]:
    """The hub's own progress bar, which tells `progress` of `total` bytes too."""
    from huggingface_hub.utils.tqdm import tqdm

    class Telling(tqdm):
        arrived = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            # The bar of bytes that are on the disk; another counts files, a third what the
            # network brings.
            self.counts = options.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts:
                with self.get_lock():  # files are fetched by several threads
                    self.arrived += int(n or 0)
                    progress(min(1.0, self.arrived / max(1, total)), total)
            shown: bool | None = super().update(n)
            return shown

    return Telling


def _require_servable(name: str, paths: Collection[str]) -> None:
    """Raises `ModelLoadFailed` for a repository whose files no load could do with."""
    for needed in NEEDED:
        if needed not in paths:
            raise ModelLoadFailed(
                f"{name}: the repository has no {needed}; name one that has, or a folder with it."
            )
    if SINGLE not in paths and INDEX not in paths:
        raise ModelLoadFailed(
            f"{name}: the repository has neither {SINGLE} nor {INDEX}, and weights in other files "
            "are not read; name one in safetensors."
        )


def _is_read(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in FILES) and not any(
        fnmatch(path, pattern) for pattern in SECOND_COPIES
    )


@contextmanager
def _refusals(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub refuses into a sentence."""
    from httpx2 import HTTPError  # what this version of huggingface_hub speaks with
    from huggingface_hub import errors

    where = f"{name} at {revision}" if revision else name
    try:
        yield
    except errors.OfflineModeIsEnabled:
        reason = "is not on this machine, and HF_HUB_OFFLINE forbids to download it"
    except errors.GatedRepoError:
        reason = "the repository is gated; accept its terms and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such repository, or it is private; check the name and HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = "the repository has no such revision"
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, HTTPError) as error:
        if _status(error) == 401:
            reason = "the hub does not accept the token; check HF_TOKEN"
        else:
            raise ModelLoadFailed(
                f"{where}: is not on this machine and could not be downloaded "
                f"({type(error).__name__}); check the network and try again.",
                retry=True,
            ) from None
    except OSError as error:
        reason = f"could not be written to disk ({error.strerror or type(error).__name__})"
    else:
        return
    raise ModelLoadFailed(f"{where}: {reason}.")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
