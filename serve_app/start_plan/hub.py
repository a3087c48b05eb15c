"""Looks up repositories on the Hugging Face hub, and downloads them.

The free disk space is checked before the first large file is downloaded.
"""

import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.errors import MachineUnfit, ModelLoadFailed
from serve_app.machine import volume
from serve_app.model.checkpoint.find import NEEDED, SMALL_FILES, find_local, hub_cache
from serve_app.model.checkpoint.other_formats import describe_files
from serve_app.model.checkpoint.shards import INDEX, SINGLE, read_json

log = logging.getLogger(__name__)

FILES = ["*.safetensors", *SMALL_FILES]
"""Files of a repository that are read; never pickles."""
SECOND_COPIES = ["consolidated*"]
"""Files that contain the same weights again; they are not downloaded."""

Progress = Callable[[float, int], None]
"""A function `progress(share, num_bytes)`: the finished share of a download, 0 to 1, and its total
bytes."""


def find_checkpoint(
    name: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    chosen_volume: str | None = None,
) -> Path:
    """Returns the folder of `name`: a local folder, or a Hugging Face repository "owner/name".

    A repository is searched in the volume's and RunPod's model caches and in the Hugging Face
    cache, then downloaded: onto the volume if one is mounted and can be written, otherwise into the
    Hugging Face cache. `revision` is a branch, tag or commit; None is the default branch. `token`
    gives access to gated repositories.

    Raises `ModelLoadFailed`, with `retry` if another try may help.
    """
    folder = volume.volume_folder(chosen_volume)
    if (local_folder := find_local(name, revision, volume=folder)) is not None:
        return local_folder
    return download(look_up(name, revision, token, download_cache(folder)), token)


def download_cache(folder: Path) -> Path | None:
    """Returns the model cache on the volume `folder`; None if only the Hugging Face cache can be
    used. Logs the reason if a volume is mounted.
    """
    if not volume.is_mounted(folder):
        return None
    cache = hub_cache(folder)
    if (problem := volume.write_problem(cache)) is not None:
        log.warning("The model is not kept on the volume: %s.", problem)
        return None
    return cache


@dataclass(frozen=True)
class Repository:
    """One revision of a repository, as the hub describes it."""

    name: str
    revision: str | None
    """Branch, tag or commit; None is the default branch."""
    cache: Path | None
    """The cache to which it is downloaded; None is the Hugging Face cache."""
    config: dict[str, Any]
    """The parsed config.json."""
    num_bytes: int
    """Bytes of the files that are read."""
    missing_bytes: int
    """Bytes of those files that are not in the cache yet."""


def look_up(name: str, revision: str | None, token: str | None, cache: Path | None) -> Repository:
    """Asks the hub for repository `name`, and downloads its config.json into `cache`.

    If `cache` has no space for the repository, logs the reason and uses the Hugging Face cache.
    Raises `ModelLoadFailed` as `download` does, and if the repository lacks a needed file.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    with _refusals(name, revision):
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
        commit = info.sha or revision or "main"
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        read = set(filter_repo_objects(sizes, allow_patterns=FILES, ignore_patterns=SECOND_COPIES))
        _require_servable(name, read, sizes)
        config = hf_hub_download(name, "config.json", revision=commit, token=token, cache_dir=cache)
        missing = {
            path
            for path in read
            if not isinstance(try_to_load_from_cache(name, path, cache, commit), str)
        }
    repository = Repository(
        name,
        revision,
        cache,
        read_json(Path(config)),
        sum(sizes[path] for path in read),
        sum(sizes[path] for path in missing),
    )
    if cache is not None and (problem := disk_problem(repository)) is not None:
        log.warning("The model is not kept on the volume: %s.", problem)
        return look_up(name, revision, token, None)
    return repository


def require_disk(repository: Repository) -> None:
    """Raises `MachineUnfit` if the disk has no space for the missing files of `repository`."""
    if (problem := disk_problem(repository)) is not None:
        raise MachineUnfit(
            f"{problem}; free some space, or set HF_HOME to another disk.", check="disk"
        )


def disk_problem(repository: Repository) -> str | None:
    """Returns the reason why the disk has no space for the missing files; None if it has."""
    from huggingface_hub.constants import HF_HUB_CACHE

    name, cache = repository.name, repository.cache or Path(HF_HUB_CACHE)
    blobs = cache / f"models--{name.replace('/', '--')}" / "blobs"
    partial_bytes = sum(file.stat().st_size for file in blobs.glob("*.incomplete"))
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if repository.missing_bytes - partial_bytes <= free:
        return None
    return (
        f"{name}: the download takes {(repository.missing_bytes - partial_bytes) / 1e9:.1f} GB, "
        f"but only {free / 1e9:.1f} GB are free in {cache}"
    )


def download(
    repository: Repository, token: str | None = None, progress: Progress | None = None
) -> Path:
    """Downloads `repository` and returns its folder. Resumes an earlier download.

    Shows a progress bar on a terminal. Raises `ModelLoadFailed`, with `retry` if another try may
    help.
    """
    from huggingface_hub import snapshot_download

    require_disk(repository)
    with _refusals(repository.name, repository.revision):
        return Path(
            snapshot_download(
                repository.name,
                revision=repository.revision,
                token=token,
                cache_dir=repository.cache,
                allow_patterns=FILES,
                ignore_patterns=SECOND_COPIES,
                tqdm_class=progress and _reporting(progress, repository.missing_bytes),
            )
        )


def _reporting(progress: Progress, total: int) -> type[Any]:
    """Returns the hub's progress bar class, extended to call `progress` with its share of `total`
    bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporting(tqdm):
        arrived = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            # This bar counts bytes on the disk. The others count files and network bytes.
            self.counts = options.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts:
                with self.get_lock():  # several threads fetch files
                    self.arrived += int(n or 0)
                    progress(min(1.0, self.arrived / max(1, total)), total)
            is_displayed: bool | None = super().update(n)
            return is_displayed

    return Reporting


def _require_servable(name: str, paths: Collection[str], all_paths: Collection[str]) -> None:
    """Raises `ModelLoadFailed` if a repository lacks a file that every load needs.

    `paths` are the files that are read. `all_paths` are all files; they help to describe the
    repository.
    """
    for names in (*NEEDED, (SINGLE, INDEX)):
        if not any(needed in paths for needed in names):
            instead = "name a repository or a folder that has it"
            if (description := describe_files(all_paths)) is not None:
                instead = f"it has {description}"
            raise ModelLoadFailed(f"{name}: the repository has no {' or '.join(names)}; {instead}.")


@contextmanager
def _refusals(name: str, revision: str | None) -> Iterator[None]:
    """Converts the errors of the hub's client to `ModelLoadFailed` with one sentence."""
    from httpx2 import HTTPError  # huggingface_hub's HTTP client
    from huggingface_hub import errors

    where = f"{name} at {revision}" if revision else name
    try:
        yield
    except errors.OfflineModeIsEnabled:
        reason = "it is not on this machine, and HF_HUB_OFFLINE forbids downloads"
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
                f"{where}: it is not on this machine and could not be downloaded "
                f"({type(error).__name__}); check the network and try again.",
                retry=True,
            ) from None
    except OSError as error:
        reason = f"it could not be written to disk ({error.strerror or type(error).__name__})"
    else:
        return
    raise ModelLoadFailed(f"{where}: {reason}.")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
