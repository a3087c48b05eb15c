"""RunPod jobs: takes them from the platform, answers them with the model, and posts the results.

Read `start.py` first, which puts the parts together. A job then passes

    poll         brings jobs
    job_loop     runs each in a task, stops those that the platform names, and drains at the end
    in_flight    remembers it until it is answered
    job          reads its `input` as a `Call` of the HTTP API
    handler      calls the model; turns an exception into the error of a failed job
    buffer       reads a stream of the model ahead while a post is under way
    output       merges its chunks, and writes each as JSON once
    result       its output or error as a whole, within the platform's size limit
    posts        posts progress, chunks, and the result until the platform has it

`supervisor` starts the model for all jobs that wait, and once more when it dies; `progress` posts
updates meanwhile. `sdk` is RunPod's SDK, whose loop drives `job_loop`. `drain` and `backoff` keep
time. `local` runs one job from the command line, without a platform. The model itself runs in Ray,
which `serve_app.node` starts.
"""
