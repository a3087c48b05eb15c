"""The command `mixtral-serve`.

Read `commands.py` first: it has one function per subcommand. Importing this package loads no Ray,
torch or pydantic, so that `--help` is fast. The subcommands' modules:

    run       serving
    chat      chat, a terminal client
    batch     batch, with batch_files
    quality   quality, which measures the loss by 4-bit weights; quality_text (the text),
              quality_sides (the models), quality_scores (the numbers), quality_table (the output)
    kernels   compile_kernels
    keys      keys
    all       progress (bars), terminal_log
"""
