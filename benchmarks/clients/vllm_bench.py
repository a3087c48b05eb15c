"""vLLM's `vllm bench serve`: random prompts on each of OpenAI's APIs."""

import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.clients.features import Server, feature, main, run_command

SCRIPT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""The command's own code: in the build for CPUs, the command `vllm` does not find its version."""


def bench(server: Server, backend: str, path: str, *options: str) -> None:
    """Sends six requests of 64 random tokens, with answers of 16 tokens; all must end."""
    folder = tempfile.mkdtemp()
    prefix = Path(sys.prefix) / "lib" / "libiomp5.so"
    run_command(
        *(sys.executable, "-c", SCRIPT, "--backend", backend, "--base-url", server.url),
        *("--endpoint", path, "--model", server.model, "--tokenizer", server.tokenizer),
        *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16"),
        *("--num-prompts", "6", "--max-concurrency", "3", "--disable-tqdm", "--save-result"),
        *("--result-dir", folder, "--result-filename", "result.json", *options),
        variables={
            "OPENAI_API_KEY": server.key,
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": os.pathsep.join(str(path) for path in [prefix] if prefix.exists()),
        },
    )
    result = json.loads((Path(folder) / "result.json").read_text())
    assert result["completed"] == 6, result["completed"]
    assert result["failed"] == 0
    assert result["mean_ttft_ms"] > 0
    assert result["total_output_tokens"] > 0


@feature
def completions(server: Server) -> None:
    bench(server, "openai", "/v1/completions", "--ignore-eos")


@feature
def chat(server: Server) -> None:
    bench(server, "openai-chat", "/v1/chat/completions")


@feature
def completions_logprobs(server: Server) -> None:
    bench(server, "vllm", "/v1/completions", "--logprobs", "2", "--request-rate", "20")


@feature
def responses(server: Server) -> None:
    bench(server, "openai-responses", "/v1/responses")


if __name__ == "__main__":
    main()
