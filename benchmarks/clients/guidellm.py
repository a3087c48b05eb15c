"""guidellm: its benchmark of a server, on each of OpenAI's APIs."""

import json
import tempfile
from pathlib import Path

from benchmarks.clients.features import Server, feature, main, run_command

DATA = "kind=synthetic_text,prompt_tokens=64,output_tokens=16"


def bench(server: Server, request_format: str, profile: str) -> None:
    """Sends six requests of synthetic text; all must end, with usage and times."""
    report = Path(tempfile.mkdtemp()) / "report.json"
    backend = f"kind=openai_http,target={server.url},model={server.model},api_key={server.key}"
    run_command(
        *("guidellm", "run", "--backend", f"{backend},request_format={request_format}"),
        *("--profile", profile, "--constraint", "kind=max_requests,count=6"),
        *("--tokenizer", f"kind=huggingface_auto,model={server.tokenizer}", "--data", DATA),
        *("--output", f"kind=json,path={report}", "--disable-console"),
        variables={"HF_HUB_OFFLINE": "1"},
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 6, totals
    assert totals["errored"] == 0
    tokens = benchmark["metrics"]["output_token_count"]["successful"]["mean"]
    assert tokens > 0, tokens


@feature
def completions(server: Server) -> None:
    bench(server, "/v1/completions", "kind=synchronous")


@feature
def chat(server: Server) -> None:
    bench(server, "/v1/chat/completions", "kind=concurrent,streams=3")


@feature
def responses(server: Server) -> None:
    bench(server, "/v1/responses", "kind=synchronous")


if __name__ == "__main__":
    main()
