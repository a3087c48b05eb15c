"""The SDK's import, in a process that has not imported it yet."""

import os
import subprocess
import sys

SCRIPT = """
import cpuinfo
from serve_app.worker.sdk import import_sdk

def measure():
    raise AssertionError("the processor is measured")

cpuinfo.get_cpu_info = measure
import_sdk()
assert cpuinfo.get_cpu_info is measure
from runpod.serverless.utils import rp_debugger
print(rp_debugger.PROCESSOR)
"""


def test_the_sdk_knows_the_processor_without_measuring_it() -> None:
    """`import_sdk` does not measure the processor, and the SDK's debugger still has its name."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    import cpuinfo

    measured = cpuinfo.get_cpu_info().get("brand_raw", "Unable to get processor info.")
    assert run.stdout.strip() == measured


LATE_SIGNAL = """
import asyncio, os, signal
from serve_app.worker.sdk import SdkLoop, import_sdk

os.environ["RUNPOD_WEBHOOK_GET_JOB"] = "http://127.0.0.1:9/job-take/$ID?gpu=x"
import_sdk()

async def poll(_):
    if not loop.is_ending:
        os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0)

loop = SdkLoop(1, poll, poll, lambda: print("drain"))
loop.run()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_after_the_loop_changes_nothing() -> None:
    """A second SIGTERM, after the last job was answered, raises nothing."""
    checks = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true"}
    run = subprocess.run(
        [sys.executable, "-c", LATE_SIGNAL],
        capture_output=True,
        text=True,
        env={**os.environ, **checks},
    )
    assert run.returncode == 0, run.stderr
    assert "drain" in run.stdout
