"""Starts the container: `python runpod_entry.py`. Importing this module loads nothing.

RUNPOD_SERVERLESS=true, the default, takes RunPod jobs; `false` serves HTTP on PORT. SERVE_CONFIG
names the YAML, the same file that `serve run` takes. `--test_input '{"input": {...}}'` answers one
job on this machine and exits. `handler` answers jobs in scripts and unit tests.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve_app.cold_start.check import Checked
    from serve_app.config.settings import EntrySettings, Settings
    from serve_app.errors import ModelLoadFailed

log = logging.getLogger("runpod_entry")

SDK_DEFAULTS = {
    # The SDK's own default, DEBUG, logs every answer.
    "RUNPOD_DEBUG_LEVEL": "INFO",
    # The SDK's checks import torch and leave a CUDA context in this process, which runs no model.
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    "RUNPOD_SKIP_GPU_CHECK": "true",
}


def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Answers `{"id": ..., "input": {...}}` on this machine, with the model of SERVE_CONFIG.

    Returns `{"output": ...}`, or `{"error": message, "status", "retry"}`. The first job that needs
    the model starts it in a separate process, which later calls use too.
    """
    from serve_app.worker import local_handler

    return local_handler.answer(Path(__file__), job)


def main(arguments: list[str] | None = None) -> int:
    """Runs the worker, the HTTP server or one job, as environment and `arguments` say.

    Returns the exit code. Logs every failure.
    """
    # First, so that no failure is silent.
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        return _start(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        log.info("Interrupted.")
        return 130  # 128 and the number of SIGINT, as in a shell
    except Exception as error:
        from serve_app.config.settings import ConfigError
        from serve_app.errors import ServeError

        if isinstance(error, ConfigError | ServeError):
            log.error("%s", error)
        else:
            log.exception("The worker failed: %s", error)
        return 1


def _start(arguments: list[str]) -> int:
    from serve_app.worker import local_handler

    parser = argparse.ArgumentParser(prog="runpod_entry.py", description=__doc__)
    parser.add_argument("--test_input", help='one job as JSON: {"input": {...}}')
    parser.add_argument(local_handler.FLAG, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rp_serve_api", action="store_true", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args(arguments)  # the SDK reads arguments of its own
    if options.test_input is None and not options.answer_lines:
        # Handles SIGTERM during the imports below, which take a moment. Later handlers let running
        # jobs and requests finish. A job from the command line keeps the default handler, because
        # a stopped job is not a success.
        signal.signal(signal.SIGTERM, _end_before_jobs)

    from serve_app.config.log_format import use_log_format
    from serve_app.config.settings import ConfigError, EntrySettings

    if options.rp_serve_api:
        raise ConfigError(
            "--rp_serve_api is not supported; `python -m emulator` answers /run, /runsync and the "
            "others on this machine, and RUNPOD_SERVERLESS=false serves HTTP."
        )

    entry = EntrySettings.from_environment()
    use_log_format(entry.serve_config)
    if entry.runpod_endpoint_id is None:  # on RunPod all lines are JSON, which is set up below
        # The imports and the check below take seconds on a busy machine.
        log.info("Starting with %s.", entry.serve_config)

    from serve_app.worker import job_log, local

    job = local.find(options.test_input, entry)
    if job is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if options.answer_lines:
        settings, checked = _checked(entry)
        return local.answer_lines(settings, entry.serve_config, checked)
    if job is not None:
        return _answer_one(entry, job)
    if not entry.runpod_serverless:
        return _serve_http(entry)
    if entry.runpod_endpoint_id is not None:
        job_log.use_json_lines()
    if entry.runpod_webhook_get_job is None:
        raise ConfigError(
            "There are no jobs to take: RUNPOD_WEBHOOK_GET_JOB, which RunPod sets, is missing. "
            "Answer one job with --test_input '{\"input\": {...}}', or set "
            "RUNPOD_SERVERLESS=false to serve HTTP."
        )
    return _take_jobs(entry)


def _answer_one(entry: "EntrySettings", job: dict[str, Any]) -> int:
    from serve_app.cold_start.check import check_config, check_start
    from serve_app.worker import local

    checked = check_start(entry.serve_config, check_config(entry.serve_config))
    return local.run(checked, entry.serve_config, job)


def _serve_http(entry: "EntrySettings") -> int:
    from serve_app.cold_start.check import check_config, check_start
    from serve_app.node import fitness, http
    from serve_app.node.banner import banner, exposure
    from serve_app.node.http_endpoint import HttpEndpoint

    # Opens PORT_HEALTH before the check, which may wait for the hub.
    options = {"host": "0.0.0.0", "port": entry.port}
    endpoint = HttpEndpoint(options, entry.port_health)
    endpoint.proxy.prepare()
    settings = check_config(entry.serve_config)
    checked = check_start(entry.serve_config, settings)
    if (problem := fitness.first_problem(fitness.checks(settings, None))) is not None:
        raise problem
    for line in banner(settings, entry.serve_config, None, checked.lines):
        log.info("%s", line)
    log.log(*exposure(options, settings))
    return http.run(checked, entry.serve_config, endpoint)


def _take_jobs(entry: "EntrySettings") -> int:
    from serve_app.worker import start

    settings, checked = _checked(entry)
    for name, value in SDK_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return start.run(settings, entry.serve_config, checked)


def _checked(entry: "EntrySettings") -> "tuple[Settings, Checked | ModelLoadFailed]":
    """Returns the settings and the result of the check, or the error if no start can succeed."""
    from serve_app.cold_start.check import check_config, check_start
    from serve_app.errors import ModelLoadFailed

    settings = check_config(entry.serve_config)
    try:
        return settings, check_start(entry.serve_config, settings)
    except ModelLoadFailed as error:
        # If the worker ended here, its jobs would wait while the platform restarts it endlessly.
        log.warning("%s", error)
        return settings, error


def _end_before_jobs(*_: object) -> None:
    log.info("Stopped before any job was taken.")
    raise SystemExit(0)


if __name__ == "__main__":
    from serve_app.machine import processes

    processes.block_alarms()
    sys.exit(main())
