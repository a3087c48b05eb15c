"""RunPod jobs: takes them from the platform, answers them with the model, and posts the results.

Read `start.py` first, which puts the parts together. A job then passes

    poll         brings jobs
    job_loop     runs each in a task, stops those that the platform names, and drains at the end
    in_flight    remembers it until it is answered
    job          reads its `input` as a `Call` of the HTTP API
    handler      calls the model; turns an exception into the error of a failed job
    buffer       reads a stream of the model ahead while a post is under way
    output       merges its chunks, and writes each as JSON once
    job_log      logs its start and its end
    result       its output or error as a whole, within the platform's size limit
    posts        posts progress, chunks, and the result until the platform has it

One delivery of a job passes these states:

    taken -> running -> posting its result -> acknowledged
       |        |          |-> given up      after 5 minutes, or at the end of a drain
       |        |          |-> retried       its failure is posted, and it is delivered again: the
       |        |          |                 post ends, and the new delivery runs
       |        |-> stopped                  the platform names it; nothing is posted
       |        |-> refused -> posting       a drain cuts it
       |-> kept                              an earlier delivery runs; it runs if that is stopped
       |-> dropped                           its output was acknowledged lately

`in_flight` decides what becomes of a delivery, `job_loop` moves it on, and `posts` ends it.
`handler` retries the call to the model once within "running", if the model dies before the job has
output.

`supervisor` starts the model for all jobs that wait, and once more when it dies; `progress` posts
updates meanwhile. `sdk` is RunPod's SDK, whose loop drives `job_loop`. `drain` and `backoff` keep
time. `local` runs jobs without a platform, for the command line and for `local_handler`, the
function that scripts and unit tests call. The model itself runs in Ray,
which `serve_app.node` starts.
"""
