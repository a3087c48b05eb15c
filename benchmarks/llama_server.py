"""llama.cpp's server through xllamacpp. Runs in the environment of that peer.

python llama_server.py MODEL.gguf PORT SEQUENCES CONTEXT THREADS
"""

import sys
import time

import xllamacpp  # type: ignore[import-not-found]  # lives in the peer's environment alone


def main() -> None:
    """Serves until the process is ended."""
    model, (port, sequences, context, threads) = sys.argv[1], map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = sequences
    params.n_ctx = sequences * context
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.hostnames = ["127.0.0.1"]
    params.port = port
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
