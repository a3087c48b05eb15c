"""The 4-bit copy of a model in `model.cache_dir`, which later starts load instead of the original.

Made at the first start by `convert`; a network volume is the place for it. Found by the model and
the settings that it was made with, so that others never meet it: a local folder is its path and its
files' names, sizes and times; a repository is its name and `model.revision`. So a branch
that moves on is not noticed; a `revision` that is a commit never moves. Deletes no older copies.
"""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from serve_app.config.settings import Settings
from serve_app.errors import MachineUnfit, ModelLoadFailed
from serve_app.model.checkpoint.convert import convert
from serve_app.model.checkpoint.find import is_complete
from serve_app.model.checkpoint.form import stored_form
from serve_app.model.checkpoint.shards import read_json
from serve_app.model.quantization import Quantization


def find_copy(settings: Settings) -> Path | None:
    """The folder of the complete copy; None where there is none, or none is wished for."""
    folder = copy_folder(settings)
    return folder if folder is not None and is_complete(folder) else None


def copy_folder(settings: Settings) -> Path | None:
    """Where the copy is, or will be; None where none is wished for."""
    model = settings.model
    if model.cache_dir is None or model.quantization == "none":
        return None
    name, seen = model.name.replace("/", "--"), model.name
    if (source := Path(model.name).expanduser().resolve()).is_dir():
        name, seen = source.name, repr((str(source), _files(source)))
    digest = hashlib.sha256(seen.encode()).hexdigest()[:12]
    made = (name, model.revision or "main", model.quantization, model.absmax, digest)
    return Path(model.cache_dir).expanduser() / "--".join(made)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Weights, configuration, tokenizer and chat template: all that a copy is made of."""
    read = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
    files = [(file.name, file.stat()) for file in read if file.is_file()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def require_writable(settings: Settings) -> None:
    """Raises `MachineUnfit` where a copy is wished for and the disk would not take it."""
    if (folder := copy_folder(settings)) is None:
        return
    existing = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    try:
        # Really, because permissions say little of network volumes and nothing to root.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"1")
    except OSError as error:
        raise MachineUnfit(
            f"`model.cache_dir`: {existing} cannot be written ({error.strerror}); name another.",
            check="volume",
        ) from None


def make_copy(
    settings: Settings, source: Path, notes: list[str], progress: Callable[[float], None]
) -> Path:
    """Makes the copy of the checkpoint in folder `source`; returns the folder to load.

    That is `source` itself where another process is making the copy at this moment.
    Raises `ModelLoadFailed` as `convert` does.
    """
    folder = copy_folder(settings)
    quantization = settings.model.quantization
    if folder is None or quantization == "none":
        return source
    document = read_json(source / "config.json")
    form = stored_form(document)
    if form == "fused":
        return source
    # What is in 4 bits keeps its own absmax.
    wished = Quantization(quantization, settings.model.absmax) if form == "float" else None
    try:
        convert(source, folder, wished, lambda done, total, name: progress(done / total))
    except ModelLoadFailed as error:
        if not error.retry:
            raise
        notes.append(f"{folder}: another process writes the 4-bit copy, so this start reads floats")
        return source
    notes.append(f"{folder}: the 4-bit copy for later starts")
    return folder
