"""mixtral-serve: Mixtral 8x7B in four bits on one GPU, served from one Ray Serve deployment.

docs/architecture.md describes the packages. Importing this package loads nothing; each package in
it imports its libraries when it uses them.
"""

__version__ = "0.1.0"
