"""What the process that orders a load does around it: predicts, guards, and reads ahead.

Read `cold_start.py` first: `ColdStart` wraps any load with

    forecast.py       how long the load will take, and a warning where that is too long
    crash_guard.py    no further load after three that failed alike; `load_records.py` keeps them
    read_ahead.py     reads the weights into the page cache while Ray starts

`killed.py` explains the death of a process that loaded. The load itself runs in the replica's
process, see `loading/`.
"""
