"""Chooses the device and the dtype, from the settings alone.

Ray must know whether a replica needs a GPU before a process can look for one, so `auto` does not
depend on the machine. `machine_fit.py` refuses a machine without the chosen GPU.
"""

from typing import Literal

from serve_app.config.sections import ModelSettings

Device = Literal["cuda", "cpu"]
Dtype = Literal["float32", "bfloat16", "float16"]


def choose_device(model: ModelSettings) -> Device:
    """Returns the device for `model.device`. auto: a GPU, except for the tiny model, which is fast
    on a CPU."""
    if model.device == "auto":
        return "cpu" if model.name == "tiny" else "cuda"
    return model.device


def choose_dtype(model: ModelSettings, device: Device) -> Dtype:
    """Returns the dtype for `model.dtype`. auto: bfloat16 on a GPU, float32 on a CPU."""
    if model.dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    return model.dtype


def notes(model: ModelSettings, device: Device, dtype: Dtype) -> list[str]:
    """Returns notes about the choices for settings that are auto, with their reasons."""
    chosen = []
    if model.device == "auto":
        rule = "the tiny model needs no GPU" if device == "cpu" else "the default"
        chosen.append(f"device {device}: {rule}")
    if model.dtype == "auto":
        chosen.append(f"dtype {dtype}: the default on {device}")
    return chosen
