"""The command `mixtral-serve`.

Read `commands.py` first: it has one function per subcommand. `chat.py` is the terminal client of
`mixtral-serve chat`, `batch.py` answers a file of requests, `quality.py` measures the loss by 4-bit
weights, and `progress.py` shows progress. Importing this package loads no Ray, torch or pydantic,
so that `--help` is fast.
"""
