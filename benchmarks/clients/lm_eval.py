"""lm_eval: tasks that generate and tasks of log likelihood, from files written here."""

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.clients.features import Server, feature, main, run_command

DOCUMENTS = [
    {"question": f"What is the capital of {country}?", "answer": city, "choices": cities}
    for country, city, cities in (
        ("France", "Paris", ["Paris", "London"]),
        ("England", "London", ["Paris", "London"]),
        ("Italy", "Rome", ["Oslo", "Rome"]),
    )
]
SHARED = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "metadata": {"version": 1},
}
TASKS: dict[str, dict[str, Any]] = {
    "generates": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    },
    "chooses": {
        "output_type": "multiple_choice",
        "doc_to_target": "{{choices.index(answer)}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean"}],
    },
    "rolls": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{answer}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def evaluate(server: Server, task: str, model: str, path: str, *options: str) -> dict[str, Any]:
    """Returns the results of one task, and one sample of each document."""
    folder = Path(tempfile.mkdtemp())
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    definition = (
        SHARED | TASKS[task] | {"task": task, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    )
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(definition))
    arguments = f"model={server.model},base_url={server.v1}{path},tokenizer={server.tokenizer}"
    run_command(
        *("lm_eval", "run", "--model", model, "--tasks", task, "--include_path", str(folder)),
        *(
            "--model_args",
            f"{arguments},tokenizer_backend=huggingface,num_concurrent=2,max_retries=1",
        ),
        *("--output_path", str(folder / "out"), "--log_samples", *options),
        variables={
            "OPENAI_API_KEY": server.key,
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )
    (found,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(DOCUMENTS)
    return {"results": json.loads(found.read_text())["results"][task], "samples": rows}


@feature
def generate(server: Server) -> None:
    found = evaluate(server, "generates", "local-completions", "/completions")
    assert 0 <= found["results"]["exact_match,none"] <= 1
    assert all(isinstance(row["resps"][0][0], str) for row in found["samples"])


@feature
def generate_chat(server: Server) -> None:
    found = evaluate(
        server, "generates", "local-chat-completions", "/chat/completions", "--apply_chat_template"
    )
    assert all(isinstance(row["resps"][0][0], str) for row in found["samples"])


@feature
def loglikelihood(server: Server) -> None:
    found = evaluate(server, "chooses", "local-completions", "/completions")
    assert 0 <= found["results"]["acc,none"] <= 1
    for row in found["samples"]:
        logprobs = [float(choice[0][0]) for choice in row["resps"]]
        assert len(logprobs) == 2
        assert all(logprob < 0 for logprob in logprobs)


@feature
def loglikelihood_rolling(server: Server) -> None:
    found = evaluate(server, "rolls", "local-completions", "/completions")
    assert found["results"]["word_perplexity,none"] > 1


if __name__ == "__main__":
    main()
