"""The folder of a model's 4-bit copy, which `model.cache_dir` enables.

The folder's name depends on the source of the copy and on the settings, so that a start with other
files or settings does not find it. The source is, for a local folder, its path and its files'
names, sizes and times; for a repository, its name and `model.revision`. If a branch gets new
commits, its old copy is still used, unless `revision` is a commit. Old copies are not deleted.
"""

import hashlib
from pathlib import Path

from serve_app.config.sections import ModelSettings
from serve_app.machine.volume import is_mounted, volume_folder, write_problem


def copy_folder(model: ModelSettings) -> Path | None:
    """Returns the folder of the copy, whether it exists or not; None if the settings enable no
    copy."""
    if model.cache_dir is None or model.quantization == "none":
        return None
    name, source_id = model.name.replace("/", "--"), model.name
    if (source := Path(model.name).expanduser().resolve()).is_dir():
        name, source_id = source.name, repr((str(source), _files(source)))
    digest = hashlib.sha256(source_id.encode()).hexdigest()[:12]
    parts = (name, model.revision or "main", model.quantization, model.absmax, digest)
    return Path(model.cache_dir).expanduser() / "--".join(parts)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Returns the name, size and time of the files from which the copy is made."""
    read = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
    files = [(file.name, file.stat()) for file in read if file.is_file()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def copy_problem(folder: Path, chosen_volume: str | None) -> str | None:
    """Returns the reason why the copy cannot be written to `folder`; None if it can."""
    volume = volume_folder(chosen_volume)
    if folder.is_relative_to(volume) and not is_mounted(volume):
        return f"no volume is mounted at {volume}"
    return write_problem(folder)
