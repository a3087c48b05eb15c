"""The least that `serve run` can serve: `benchmarks.empty_app:app` answers every request with ok.

`start` compares `mixtral-serve run` with it. This program is `serve run` with Ray's dashboard off,
for which `serve run` has no option.
"""

import sys

from ray import serve


class Empty:
    """Answers ok."""

    async def __call__(self, request: object) -> str:
        return "ok"


app = serve.deployment(Empty).bind()


def main() -> None:
    """Does what `serve run benchmarks.empty_app:app` does, in a Ray without dashboard."""
    import ray
    from ray.serve.scripts import cli

    ray.init(address="local", namespace="serve", include_dashboard=False)
    sys.argv[1:] = ["run", "benchmarks.empty_app:app"]
    cli()


if __name__ == "__main__":
    main()
