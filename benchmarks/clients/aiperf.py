"""aiperf: its profile of a server, streamed and not, on each of OpenAI's APIs."""

import json
import tempfile
from pathlib import Path

from benchmarks.clients.features import Server, feature, main, run_command


def profile(server: Server, endpoint: str, *options: str) -> None:
    """Sends six requests of synthetic text; all must end.

    `ignore_eos` is set because aiperf counts an answer without text as an error, and the model may
    choose the end of the answer as its first token.
    """
    folder = tempfile.mkdtemp()
    run_command(
        *("aiperf", "profile", "--model", server.model, "--url", server.url),
        *("--endpoint-type", endpoint, "--tokenizer", server.tokenizer, "--api-key", server.key),
        *("--request-count", "6", "--concurrency", "3", "--ui-type", "simple"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16"),
        *("--extra-inputs", "ignore_eos:true"),
        *("--workers-max", "1", "--output-artifact-dir", folder, *options),
    )
    (found,) = Path(folder).rglob("profile_export_aiperf.json")
    result = json.loads(found.read_text())
    assert not result.get("error_summary"), result["error_summary"]
    assert result["request_count"]["avg"] == 6, result["request_count"]
    assert result["output_sequence_length"]["avg"] > 0


@feature
def chat_stream(server: Server) -> None:
    profile(server, "chat", "--streaming")


@feature
def chat(server: Server) -> None:
    profile(server, "chat")


@feature
def completions_stream(server: Server) -> None:
    profile(server, "completions", "--streaming")


@feature
def responses_stream(server: Server) -> None:
    profile(server, "responses", "--streaming")


if __name__ == "__main__":
    main()
