"""The command `mixtral-serve`.

Read `commands.py` first: one function per subcommand. `chat.py` is the terminal client of
`mixtral-serve chat`, `batch.py` answers a file of requests, `quality.py` measures what 4 bits cost,
`progress.py` shows how far long work is. Importing this package loads no Ray, torch or pydantic, so
that `--help` answers at once.
"""
