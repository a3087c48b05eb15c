"""mixtral-serve: Mixtral 8x7B in four bits on one GPU, served from one Ray Serve deployment.

Importing this package loads nothing: each room imports what it needs when it is used.
"""

__version__ = "0.1.0"
