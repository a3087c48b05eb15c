"""RunPod's SDK, imported without the second that it spends on measuring the processor's clock.

Its debugger's module, which workers do not use unless told `--rp_debugger`, asks py-cpuinfo at
import for all about the processor, and takes the name of it alone. py-cpuinfo starts a process
that counts ticks for a second: half of the time that this process takes until it takes jobs.
"""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def import_sdk() -> None:
    """Imports `runpod`; raises what its import raises, as `ValueError` for a wrong log level."""
    import cpuinfo

    measures = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = named
    try:
        import runpod  # noqa: F401
    finally:
        cpuinfo.get_cpu_info = measures


def named() -> dict[str, str]:
    """The processor's name as py-cpuinfo has it; nothing where the kernel does not say (ARM)."""
    for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return {"brand_raw": value.strip()}
    return {}
