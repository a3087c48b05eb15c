"""What surrounds a load, in the process that orders it. Knows no jobs, no Ray and no SDK.

Read `cold_start.py` first: `ColdStart` wraps any load with

    forecast                       how long it will take, and what to do where that is too long
    crash_guard, load_records      three loads that failed alike are enough: kept on the volume
    read_ahead                     the weights, into the page cache while Ray starts

`killed.py` says why a process that loaded is gone without a word. The load itself is `load.py`, in
the replica's process.
"""
