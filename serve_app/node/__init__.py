"""Starts, watches and ends Ray and the deployment on this machine.

Read `cluster.py` first: it starts the deployment (`deployment.py`), watches it and stops it. The
other modules, by subject:

    Ray's processes   ray_node starts and ends Ray and Serve; head and ray_worker make the start
                      faster; session_folder keeps other users out of Ray's folders; ray_processes
                      and reaper find and kill processes; ray_thread calls Ray's blocking functions
                      for an event loop
    calls             client sends calls through the deployment handle; session_router chooses
                      among several replicas
    HTTP              http serves the deployment, for `mixtral-serve run` and for `runpod_entry.py`
                      with RUNPOD_SERVERLESS=false; http_endpoint has its port, status and
                      signals; drain finishes running requests; health_listener and
                      health_server answer `/ping` while the model loads
    HAProxy           haproxy chooses between HAProxy and Serve's own proxy; haproxy_program changes
                      HAProxy's configuration, with the lines of haproxy_errors, haproxy_refusals (a
                      full queue), haproxy_sessions (several replicas) and cors
    a start           fitness checks the machine, banner logs its properties; phases follows the
                      load and ready_replicas the number of ready replicas, each with follower;
                      worker_lines writes the log of Ray's processes as JSON
"""
