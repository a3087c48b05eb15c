"""`mixtral-serve check --load CONFIG`: loads the model on this machine and tries it.

Prints facts about the machine and the model, and writes them to a JSON file that a user can send
to the developers. The file contains the prompts below and the answers to them, but no secrets. The
prompts take the path of requests without HTTP and Ray. `benchmarks/` measures speed better.
"""

import asyncio
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import serve_app
from serve_app.api.server import MixtralServer
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import InvalidRequest, ModelLoadFailed
from serve_app.loading.load import load
from serve_app.machine.volume import file_problem
from serve_app.protocol.call import Call, JsonReply
from serve_app.start_plan.plan import StartPlan

if TYPE_CHECKING:
    from serve_app.model.quantization import Quantization

PROMPTS = (
    "What is the capital of France?",
    "What is 2 + 3?",
    "Spell the word cat.",
    "What colour is the sky?",
    "Who are you?",
    "Name three animals.",
    "Repeat after me: red green blue",
    "Hello!",
    "Count from 1 to 10.",
    "Give me a JSON object with the key name and the value Ada.",
)
BATCHES = (1, 8, 32)
NUM_TOKENS = 64
"""Number of tokens of each answer whose speed is measured."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Maximum relative error of a 4-bit product, compared with the same product in float32."""


def run(
    settings: Settings, plan: StartPlan, out: Path, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Loads the model, tries it, calls `show` with each result, and writes all results to `out` as
    JSON.

    Raises `ModelLoadFailed` if the model cannot be loaded or a product is wrong, and `ConfigError`
    if `out` cannot be written.
    """
    if (problem := file_problem(out)) is not None:
        raise ConfigError(f"{out}: {problem}; --out names another file for the report.")
    report: dict[str, Any] = {"version": serve_app.__version__, "machine": _machine()}
    report["model"] = settings.model.model_dump(mode="json", exclude={"hf_token"})
    show(f"Machine: {', '.join(str(value) for value in report['machine'].values())}")
    report["kernels"] = check_kernels(plan, plan.quantization, show)
    server = MixtralServer(settings, partial(load, plan=plan))
    try:
        if server.quantization != plan.quantization:  # the files of a download are more precise
            report["kernels"] = check_kernels(plan, server.quantization, show)
        report |= asyncio.run(_try(server, show))
    finally:
        server.close()
    report["vram"] = _vram()
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(f"Written to {out}.")
    return report


def check_kernels(
    plan: StartPlan, quantization: "Quantization | None", show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compares every 4-bit product on this device with the float32 product.

    Returns `{"kernel", "storage", "relative_error", "tolerance"}` for each, or an empty list if
    nothing is quantized. Raises `ModelLoadFailed` if a product is wrong.
    """
    import torch

    from serve_app.loading.device import open_device
    from serve_app.model.kernels.kernel_check import relative_errors

    if quantization is None:
        return []
    storage = f"{quantization.quant_type}, {quantization.absmax} absmax"
    device, dtype = open_device(plan), getattr(torch, plan.dtype)
    results = []
    with torch.inference_mode():
        for name, error in relative_errors(quantization, dtype, device).items():
            limit = TOLERANCE[plan.dtype]
            measured = {"relative_error": error, "tolerance": limit}
            results.append({"kernel": name, "storage": storage, **measured})
            show(f"Kernel {name}, {storage}: relative error {error:.1e}, allowed {limit:.0e}")
            if not error <= limit:
                raise ModelLoadFailed(f"Kernel {name} is wrong on this device; send the output.")
    return results


async def _try(server: MixtralServer, show: Callable[[str], None]) -> dict[str, Any]:
    health = server.health()
    for part, num_bytes in health["memory"].items():
        show(f"{part:>10}: {num_bytes:>15,} bytes")
    answers = []
    for prompt in PROMPTS:
        answer = await _answer(server, prompt)
        answers.append({"prompt": prompt, "text": answer["text"]})
        show(f"{prompt} -> {answer['text']}")
    speeds = {}
    for size in (size for size in BATCHES if size <= server.settings.engine.max_num_seqs):
        speeds[str(size)] = await _tokens_per_s(server, size)
        show(f"Batch {size}: {speeds[str(size)]:.1f} tokens/s")
    keys = ("memory", "load", "notes")
    return {
        **{key: health[key] for key in keys},
        "answers": answers,
        "tokens_per_s": speeds,
    }


async def _answer(server: MixtralServer, prompt: str) -> dict[str, Any]:
    """Returns the answer to a chat, or the completion of a model without a chat template."""
    body = {"prompt": prompt, "temperature": 0}
    try:
        return await _ask(server, "/prompt", body)
    except InvalidRequest:
        continued = await _ask(server, "/v1/completions", body)
        return {"text": continued["choices"][0]["text"]}


async def _tokens_per_s(server: MixtralServer, size: int) -> float:
    """Returns the tokens per second of `size` concurrent answers; the time includes their
    prompts."""
    body = {"prompt": PROMPTS[0], "ignore_eos": True, "temperature": 0}
    started = time.perf_counter()
    await asyncio.gather(*(_ask(server, "/v1/completions", body) for _ in range(size)))
    return size * NUM_TOKENS / (time.perf_counter() - started)


async def _ask(server: MixtralServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    body = {"max_tokens": NUM_TOKENS, **body}
    reply = await server.answer(Call("POST", path, body, "trial"))
    assert isinstance(reply, JsonReply)
    return reply.body


def _machine() -> dict[str, str]:
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
    }


def _vram() -> dict[str, int] | None:
    """Returns the bytes on the GPU: the maximum that torch held, free and total; None without a
    GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"peak": torch.cuda.max_memory_allocated(), "free": free, "total": total}
