"""The metrics of one replica, for `/metrics` and for Ray's metrics port.

Read `metrics.py` first, which counts and writes Prometheus' text. `histograms.py` has names and
buckets, `request_metrics.py` measures one answer, and `ray_port.py` copies all series to Ray.
"""
