"""RunPod's serverless platform on loopback, for tests, benchmarks and trying a worker at home.

It serves both sides of one endpoint, "ep": the URLs that a worker takes jobs from and posts results
to, and those that clients send jobs to. RunPod's SDK, its Python client and OpenAI's client run
against it unchanged. Two ways to start it:

    python -m emulator               prints what a worker and a client need in their environment

    with Platform() as platform, Worker(platform, home, SERVE_CONFIG="configs/tiny.yaml"):
        ...                          a platform in a thread, and a worker in a process

Read `queue.py` first: jobs and their states; `policy.py` has their time limits. `worker_api.py` and
`client_api.py` are the routes of the two sides, and `webhook.py` tells a client of an end.
`faults.py` makes the routes misbehave, `platform.py` runs all of it, and `worker.py` starts
`runpod_entry.py` as the platform would.

The routes follow the SDK's source. Behavior of the platform that no source shows is a guess, and
marked as one where it is implemented.
"""
