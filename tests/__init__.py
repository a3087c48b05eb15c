"""The tests: a folder for most packages of `serve_app` and other folders of the repository.

The files `test_*.py` beside this one test what several packages share, and the repository's pages.
Four proofs that a reader may look for:

- A request ends exactly once, and a fault leaves nothing in use: `faults`, with `settled`.
- Our logits are those of transformers: `model/driver.py`, `engine/mixtral.py`.
- The pinned libraries do what the code relies on: `test_contract.py`.
- The pages and the image's files agree with the code: `test_page_links.py`, `test_deploy.py`.

What stands in for a part that is not here:

- For the model: `fakes` behind the HTTP endpoint, `engine/fake.py` in an engine, and
  `worker/scripted_model.py` in a worker. Each follows a script.
- For RunPod's platform: the package `emulator` beside `tests`; the folder `emulator` here tests it.
- For a GPU: `triton_interpreter`, `model/kernels/cuda/emulator.py`, and `nvml`, a fake NVML.
- For the Hugging Face hub: `hub`.

What this project did not write, to compare with: `mistral` (ids of conversations),
`bitsandbytes_functions` (4-bit weights), `validated` (the clients' own models of JSON) and
`exposition` (the parser of `/metrics`).

Other helpers: `conftest` says which tests share a process; `environment` is a process's bare
environment; `processes` finds what a process has started; `listening` and `ports` find its sockets;
`mounts` makes real mounts; `tool_sets` has sets of tools; `virtual_time` is an event loop whose
clock jumps to the next timer.

Folders: `api`, `benchmarks`, `cli`, `cluster`, `cold_start`, `config`, `emulator`, `engine`,
`faults` (kills whole processes), `image` (runs the built image), `loading`, `machine`, `model`,
`node`, `protocol`, `start_plan`, `tools`, `worker`.
"""
