"""The SDK's import, in a process that has not imported it yet."""

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
