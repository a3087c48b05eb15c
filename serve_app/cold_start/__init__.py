"""The steps around a load, in the process that starts Ray: forecast, crash guard, read-ahead.

Read `cold_start.py` first: `ColdStart` wraps any load with

    forecast.py      predicts the time of the load, and warns if it is too long
    crash_guard.py   refuses a load after three that failed for the same reason;
                     `load_records.py` stores their records
    read_ahead.py    reads the weights into the page cache while Ray starts

`check.py` finds errors before a load, for `mixtral-serve check` and every start. `killed.py`
explains the death of a loading process. The load itself runs in the replica's process,
see `loading/`.
"""
