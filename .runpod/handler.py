"""Starts the worker like `python runpod_entry.py`; RunPod's Hub requires a file of this name."""

import sys

from runpod_entry import main

if __name__ == "__main__":
    sys.exit(main())
