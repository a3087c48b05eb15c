"""The decisions of a start, which are made once, before anything is loaded.

Read `plan.py` first: `plan_start(settings)` returns a `StartPlan`, which the check, the forecast,
the crash guard, the trial and the load use. Its parts:

    device.py        the device and the dtype, from the settings
    memory.py        the bytes of weights and KV cache
    machine_fit.py   compares them with this machine's memory
    model_copy.py    the folder of the 4-bit copy in `model.cache_dir`
    hub.py           repositories on the Hugging Face hub: sizes and downloads

This package imports no torch.
"""
