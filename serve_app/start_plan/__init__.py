"""What a start decides once, before anything is loaded.

Read `plan.py` first: `plan_start(settings)` returns a `StartPlan`, which the check prints and the
forecast, the crash guard, the trial and the load take. None of them looks at the checkpoint or
chooses a device again. Its parts:

    device.py        the device and the dtype, from the settings alone
    memory.py        bytes of weights and KV cache
    machine_fit.py   whether this machine has that memory
    model_copy.py    where the 4-bit copy of `model.cache_dir` is
    hub.py           repositories on the Hugging Face hub: sizes and downloads

Nothing here imports torch.
"""
