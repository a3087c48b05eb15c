"""The handler's file, as RunPod's Hub looks for one: the same as `python runpod_entry.py`."""

import sys

from runpod_entry import main

if __name__ == "__main__":
    sys.exit(main())
