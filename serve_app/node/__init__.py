"""The machine that the model is started on, for whichever door. Knows no jobs and no SDK.

Read `cluster.py` first: it starts the deployment, reaches it, watches it and takes it down, with

    ray_node, reaper           Ray on this machine, ended to the last process whatever happens
    head                       what Ray leaves out at its start, and does not wait for
    phases                     what the loading replica writes, told in the log and to clients
    forward                    a call through the deployment handle, and Ray's errors as ours
    fitness, banner            can this machine serve at all; what is said of it at the start

`http.py` is the whole of RUNPOD_SERVERLESS=false, with `health_listener.py` beside it. RunPod's
jobs are `serve_app.worker`, and what surrounds a load is `serve_app.cold_start`.
"""
