"""`python -m serve_app.check --load CONFIG`: loads the model on this machine and tries it.

For machines that we cannot reach: one command prints what a person wants to know and writes one
JSON file that can be sent back. The answers go the whole road of a request, without HTTP and Ray.
The file holds the prompts below, the answers to them and no secrets. Promises no benchmark: for
that there is `benchmarks/`.
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
"""Of each answer whose speed is measured."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Largest relative error of a 4-bit product beside the same one in float32."""


def run(
    settings: Settings, plan: StartPlan, out: Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Loads, tries, says what it finds line by line, and writes it to `out` as JSON.

    Raises `ModelLoadFailed` where the model does not load or a product is wrong, and `ConfigError`
    where `out` cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out}: its folder does not exist; --out must name a file in one.")
    report: dict[str, Any] = {"version": serve_app.__version__, "machine": _machine()}
    report["model"] = settings.model.model_dump(mode="json", exclude={"hf_token"})
    say(f"Machine: {', '.join(str(value) for value in report['machine'].values())}")
    report["kernels"] = check_kernels(plan, plan.quantization, say)
    server = MixtralServer(settings, partial(load, plan=plan))
    try:
        if server.quantization != plan.quantization:  # the files of a download are more precise
            report["kernels"] = check_kernels(plan, server.quantization, say)
        report |= asyncio.run(_try(server, say))
    finally:
        server.close()
    report["vram"] = _vram()
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(f"Written to {out}.")
    return report


def check_kernels(
    plan: StartPlan, quantization: "Quantization | None", say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every form of a 4-bit product on this device, beside the plain float32 product.

    `{"kernel", "storage", "relative_error", "tolerance"}` each; nothing where nothing is quantised.
    """
    import torch

    from serve_app.loading.device import open_device
    from serve_app.model.kernels.kernel_check import relative_errors

    if quantization is None:
        return []
    storage = f"{quantization.quant_type}, {quantization.absmax} absmax"
    device, dtype = open_device(plan), getattr(torch, plan.dtype)
    found = []
    with torch.inference_mode():
        for name, error in relative_errors(quantization, dtype, device).items():
            limit = TOLERANCE[plan.dtype]
            measured = {"relative_error": error, "tolerance": limit}
            found.append({"kernel": name, "storage": storage, **measured})
            say(f"Kernel {name}, {storage}: relative error {error:.1e}, allowed {limit:.0e}")
            if not error <= limit:
                raise ModelLoadFailed(f"Kernel {name} is wrong on this device; send the output.")
    return found


async def _try(server: MixtralServer, say: Callable[[str], None]) -> dict[str, Any]:
    health = server.health()
    for part, num_bytes in health["memory"].items():
        say(f"{part:>10}: {num_bytes:>15,} bytes")
    answers = []
    for prompt in PROMPTS:
        answer = await _answer(server, prompt)
        answers.append({"prompt": prompt, "text": answer["text"]})
        say(f"{prompt} -> {answer['text']}")
    speeds = {}
    for size in (size for size in BATCHES if size <= server.settings.engine.max_num_seqs):
        speeds[str(size)] = await _tokens_per_s(server, size)
        say(f"Batch {size}: {speeds[str(size)]:.1f} tokens/s")
    kept = ("memory", "load", "notes")
    return {
        **{key: health[key] for key in kept},
        "answers": answers,
        "tokens_per_s": speeds,
    }


async def _answer(server: MixtralServer, prompt: str) -> dict[str, Any]:
    """A chat's answer, or, of a model without a chat template, a continuation."""
    body = {"prompt": prompt, "temperature": 0}
    try:
        return await _ask(server, "/prompt", body)
    except InvalidRequest:
        continued = await _ask(server, "/v1/completions", body)
        return {"text": continued["choices"][0]["text"]}


async def _tokens_per_s(server: MixtralServer, size: int) -> float:
    """Of `size` answers at once, prompts included."""
    body = {"prompt": PROMPTS[0], "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    await asyncio.gather(*(_ask(server, "/v1/completions", body) for _ in range(size)))
    return size * NUM_TOKENS / (time.perf_counter() - began)


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
    """Bytes on the GPU: the most that torch held, what is free, and all of it."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"peak": torch.cuda.max_memory_allocated(), "free": free, "total": total}
