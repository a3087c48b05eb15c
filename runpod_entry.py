"""The RunPod door: `python runpod_entry.py`. A thin start; importing this module loads nothing.

RUNPOD_SERVERLESS=true, the default, takes RunPod jobs; `false` serves HTTP on PORT. SERVE_CONFIG
names the YAML, the same file that `serve run` takes. `--test_input '{"input": {...}}'` answers one
job on this machine and exits.
"""

import argparse
import logging
import os
import signal
import sys

log = logging.getLogger("runpod_entry")

SDK_DEFAULTS = {
    # The SDK's own default, DEBUG, prints every answer.
    "RUNPOD_DEBUG_LEVEL": "INFO",
    # Its checks import torch and leave a CUDA context in this process, which only forwards.
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    "RUNPOD_SKIP_GPU_CHECK": "true",
}


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Whatever goes wrong is a sentence in the log, never a silent end."""
    # Before anything else: a failure that nobody logs looks like a container that just stops.
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        return _start(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        log.info("Interrupted.")
        return 130  # as a shell says it
    except Exception as error:
        from serve_app.config.settings import ConfigError
        from serve_app.errors import ServeError

        if isinstance(error, ConfigError | ServeError):
            log.error("%s", error)
        else:
            log.exception("The worker cannot go on: %s", error)
        return 1


def _start(arguments: list[str]) -> int:
    from serve_app.cold_start.check import Checked, check_config, check_start
    from serve_app.config.settings import ConfigError, EntrySettings
    from serve_app.errors import ModelLoadFailed
    from serve_app.node import fitness, http
    from serve_app.worker import local, start

    parser = argparse.ArgumentParser(prog="runpod_entry.py", description=__doc__)
    parser.add_argument("--test_input", help='one job as JSON: {"input": {...}}')
    given, _ = parser.parse_known_args(arguments)  # the SDK reads arguments of its own

    entry = EntrySettings.from_environment()
    job = local.find(given.test_input, entry)
    takes_jobs = entry.runpod_serverless and entry.runpod_webhook_get_job is not None
    if job is None and entry.runpod_serverless and not takes_jobs:
        raise ConfigError(
            "There are no jobs to take, as RUNPOD_WEBHOOK_GET_JOB is set by RunPod alone. Answer "
            "one job with --test_input '{\"input\": {...}}', or set RUNPOD_SERVERLESS=false to "
            "serve HTTP."
        )
    if takes_jobs:  # until the SDK's own handler, which lets running jobs finish
        signal.signal(signal.SIGTERM, _end_before_jobs)
    endpoint: http.HttpEndpoint | None = None
    if job is None and not entry.runpod_serverless:
        # Before the check, which may ask the hub: PORT_HEALTH answers from the first moment.
        options = {"host": "0.0.0.0", "port": entry.port}
        endpoint = http.HttpEndpoint(options, entry.port_health)
    settings = check_config(entry.serve_config)
    checked: Checked | None = None
    failure: ModelLoadFailed | None = None
    try:
        checked = check_start(entry.serve_config, settings)
    except ModelLoadFailed as error:
        if not takes_jobs:
            raise
        # A worker that ended here would leave its jobs waiting, and be started again and again.
        log.warning("%s", error)
        failure = error
    if job is not None and checked is not None:
        return local.run(checked, entry.serve_config, job)
    if endpoint is not None and checked is not None:
        if (problem := fitness.first_problem(fitness.checks(settings, None))) is not None:
            raise problem
        return http.run(checked, entry.serve_config, endpoint)
    for name, value in SDK_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return start.run(settings, entry, checked, failure)


def _end_before_jobs(*_: object) -> None:
    log.info("Told to stop before any job was taken.")
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
