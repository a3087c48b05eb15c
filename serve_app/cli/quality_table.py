"""Prints the report of `mixtral-serve quality` as a table."""

from typing import Any

from serve_app.cli.quality_sides import BITSANDBYTES, FLOATS, SERVED

COLUMNS = ("weights in 4 bits", "perplexity", "KL, nats/token", "same best token")


def show(report: dict[str, Any]) -> None:
    """Prints the numbers, and for each side its 4-bit weights or the reason why it has no
    numbers."""
    from rich.console import Console
    from rich.table import Table

    text = report["text"]
    pairs = {
        (comparison["reference"], comparison["side"]): comparison
        for comparison in report["comparisons"]
    }
    table = Table(
        title=f"{report['model']}: {', '.join(text['files'])}, {text['predicted_tokens']:,} tokens "
        f"in {text['windows']} windows",
        caption=f"KL and best token: compared with {FLOATS}.",
    )
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for side in report["sides"]:
        table.add_row(
            side["name"],
            _number(side["share_in_4_bits"], "{:.1%}"),
            _number(side["perplexity"], "{:.4f}"),
            *_pair(pairs.get((FLOATS, side["name"]))),
        )
    console = Console(highlight=False)
    console.print(table)
    for side in report["sides"]:
        console.print(f"{side['name']}: {side['in_4_bits']}.", soft_wrap=True)
    if (pair := pairs.get((BITSANDBYTES, SERVED))) is not None:
        divergence, agreement = _pair(pair)
        console.print(
            f"{SERVED} compared with {BITSANDBYTES}: KL {divergence} nats/token, same best token "
            f"{agreement}.",
            soft_wrap=True,
        )


def _pair(pair: dict[str, Any] | None) -> tuple[str, str]:
    if pair is None:
        return "-", "-"
    return f"{pair['kl_nats_per_token']:.5f}", f"{pair['top1_agreement']:.2%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
