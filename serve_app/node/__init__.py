"""Starts, watches and ends Ray and the deployment on this machine.

Read `cluster.py` first: it starts the deployment, watches it and stops it, with

    ray_node                starts Ray and Serve on this machine, and ends them
    ray_processes, reaper   find and kill Ray's processes, also when this process is killed
    ray_thread              calls Ray's blocking functions for an event loop
    head, ray_worker        make Ray start faster, and reserve SIGTERM for this process
    client, session_router  send calls through the deployment handle to one of the replicas
    phases                  follows the load phases that the replica writes
    fitness, banner         check the machine before a start; log its properties

`haproxy.py` chooses between HAProxy and Serve's own proxy; Serve starts `haproxy_program.py` in the
first case. `haproxy_refusals.py` has the lines by which HAProxy refuses requests while the queue is
full. `http.py` serves the deployment over HTTP, for `mixtral-serve run` and for `runpod_entry.py`
with RUNPOD_SERVERLESS=false. `health_server.py` answers `/ping` during the start, in a process that
`health_listener.py` starts.
"""
