"""`mixtral-serve quality`: measures the loss of quality by 4-bit weights.

Scores a text with the served model, with the same checkpoint as floats in transformers, and with
transformers and bitsandbytes. Prints perplexities, the divergence of the next-token distributions
(KL, nats per token) and how often the most probable next token is the same.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import serve_app
from serve_app.cli import quality_sides as sides
from serve_app.cli.quality_scores import ITEM_BYTES, LogProbs, compare, perplexity
from serve_app.cli.quality_sides import BITSANDBYTES, FLOATS, MaxMemory, Side
from serve_app.cli.quality_text import PROSE, Windows, cut, read_texts
from serve_app.cli.terminal_log import log_to_terminal
from serve_app.cold_start.check import check_start
from serve_app.config import named
from serve_app.config.serve_config import ConfigError
from serve_app.config.settings import Settings
from serve_app.loading.load import load
from serve_app.loading.load_log import LoadLog
from serve_app.machine.volume import file_problem
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.start_plan.memory import in_gb
from serve_app.start_plan.plan import StartPlan, find_folder

log = logging.getLogger(__name__)

NUM_SIDES = 3
NO_FLOATS = {
    FLOATS: "not measured: the checkpoint contains 4-bit weights only",
    BITSANDBYTES: "not measured: transformers 5 reads no experts in 4 bits",
}


def run(config: str, texts: Sequence[Path], out: Path | None) -> None:
    """Measures the model of `config`, prints a table, and writes the numbers as JSON to `out`.

    `texts` are files; if it is empty, a text of this package is scored. Raises `ConfigError` or
    `ServeError`.
    """
    from serve_app.cli.quality_table import show

    log_to_terminal()
    files = list(texts) or [PROSE]
    contents = read_texts(files)
    if out is not None and (problem := file_problem(out)) is not None:
        raise ConfigError(f"{out}: {problem}; --json names another file.")
    path = named.find(config)
    checked = check_start(path, Settings.from_yaml(path))
    report = measure(checked.settings, checked.plan, contents)
    report["text"]["files"] = [file.name for file in files]
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)


def measure(
    settings: Settings,
    plan: StartPlan,
    texts: Sequence[str],
    max_memory: MaxMemory | None = None,
) -> dict[str, Any]:
    """Scores `texts` with each model. Returns the report that `--json` writes.

    `max_memory` limits the memory of the float model. A model that cannot be measured has no
    numbers; its `in_4_bits` has the reason.
    """
    with tempfile.TemporaryDirectory(prefix="mixtral-quality-") as name:
        folder = Path(name)
        loaded = load(settings, LoadLog.resume(settings.load_log), plan)
        try:
            windows = cut(texts, loaded.tokenizer, loaded.max_model_len)
            _require_disk(folder, windows, loaded.vocab_size)
            served = sides.served(loaded, plan.quantize_lm_head, windows, folder / "served")
        finally:
            loaded.engine.stop()
        dtype, quantization = loaded.dtype, loaded.quantization
        del loaded
        sides.free_memory()
        original = find_folder(settings, None)
        assert original is not None, "the load has downloaded the checkpoint"
        makers: dict[str, Callable[[], Side]] = {
            FLOATS: partial(sides.floats, original, dtype, windows, folder / "floats", max_memory),
            BITSANDBYTES: partial(
                sides.bitsandbytes, original, dtype, quantization, windows, folder / "bitsandbytes"
            ),
        }
        has_floats = inspect(original).form == "float"
        others = [
            _made(side, maker) if has_floats else Side(side, NO_FLOATS[side])
            for side, maker in makers.items()
        ]
        return {
            "version": serve_app.__version__,
            "model": settings.model.name,
            "text": {"predicted_tokens": len(windows.targets), "windows": len(windows.windows)},
            **_figures([others[0], served, others[1]], windows.targets),
        }


def _require_disk(folder: Path, windows: Windows, vocab_size: int) -> None:
    needed = NUM_SIDES * len(windows.targets) * vocab_size * ITEM_BYTES
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ConfigError(
            f"{folder.parent}: {in_gb(free)} are free, but the distributions need "
            f"{in_gb(needed)}; set TMPDIR to a larger disk, or use a shorter text."
        )


def _made(name: str, maker: Callable[[], Side]) -> Side:
    """Returns the side that `maker` measures, or one with the reason why it cannot be measured."""
    try:
        return maker()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        log.debug("%s could not be measured", name, exc_info=error)
        return Side(name, f"not measured: {type(error).__name__}: {reason}")
    finally:
        sides.free_memory()


def _figures(measured: Sequence[Side], targets: Sequence[int]) -> dict[str, Any]:
    """Returns each side's numbers, and the comparison of each pair of measured sides."""
    comparisons = [
        {"reference": reference.name, "side": compared.name, **compare(p, q)._asdict()}
        for reference, compared in (
            (measured[0], measured[1]),
            (measured[0], measured[2]),
            (measured[2], measured[1]),
        )
        if (p := reference.log_probs) is not None and (q := compared.log_probs) is not None
    ]
    return {
        "sides": [
            {
                "name": side.name,
                "in_4_bits": side.quantized,
                "share_in_4_bits": side.share_in_4_bits,
                "perplexity": _perplexity(side.log_probs, targets),
            }
            for side in measured
        ],
        "comparisons": comparisons,
    }


def _perplexity(log_probs: LogProbs | None, targets: Sequence[int]) -> float | None:
    return None if log_probs is None else perplexity(log_probs, targets)
