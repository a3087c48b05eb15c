"""Ray on this machine, and the deployment on it: started, watched, and ended.

Read `cluster.py` first: it starts the deployment, watches it and takes it down, with

    ray_node, reaper        start Ray on this machine and end all its processes, whatever happens
    head, ray_worker        make that start shorter
    client                  sends calls through the deployment handle
    phases                  follows the phases of a load that the replica writes
    fitness, banner         the checks of the machine before a start; what the log says about it

`http.py` serves the deployment over HTTP: `mixtral-serve run`, and `runpod_entry.py` with
RUNPOD_SERVERLESS=false. `health_server.py` answers `/ping` meanwhile, in a process that
`health_listener.py` starts. `serve_app.worker` takes RunPod jobs with the same deployment.
"""
