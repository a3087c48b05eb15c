"""The command `mixtral-serve`.

Read `commands.py` first: one function per subcommand. `chat.py` is the terminal client of
`mixtral-serve chat`, `progress.py` shows how far long work is. Importing this package loads
no Ray, torch or pydantic, so that `--help` answers at once.
"""
