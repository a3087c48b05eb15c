"""Serves the platform (`python -m emulator [--port 9000]`) and prints how to connect to it."""

import argparse

from aiohttp import web

from emulator import client_api, worker_api
from emulator.faults import Faults
from emulator.platform import create_app
from emulator.queue import Queue


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m emulator", description=__doc__)
    parser.add_argument("--port", type=int, default=9000)
    port = parser.parse_args().port
    url = f"http://127.0.0.1:{port}"

    print("# A worker, in another terminal:")
    for name, value in worker_api.environment(url).items():
        print(f"export {name}='{value}'")
    print("SERVE_CONFIG=configs/tiny.yaml .venv/bin/python runpod_entry.py\n")
    print("# A client:")
    print(
        f"curl {url}/v2/ep/runsync -H 'Authorization: Bearer {client_api.KEY}' "
        '-H \'Content-Type: application/json\' -d \'{"input": {"prompt": "What is 2 + 3?"}}\'\n'
    )

    print("# The examples:")
    print(f"export RUNPOD_API_KEY={client_api.KEY} RUNPOD_ENDPOINT_ID=ep")
    print(f"export RUNPOD_ENDPOINT_BASE_URL={url}/v2")
    print(".venv/bin/python examples/run.py\n", flush=True)

    async def app() -> web.Application:
        return create_app(Queue(), Faults())

    web.run_app(app(), host="127.0.0.1", port=port)


if __name__ == "__main__":
    main()
