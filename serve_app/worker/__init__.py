"""RunPod jobs: takes them from the platform, answers them with the model, and posts the results.

Read `start.py` first, which connects the parts. A job then passes these modules:

    poll         requests jobs from the platform
    job_loop     runs each job in a task, stops those that the platform names, and drains at the end
    in_flight    records the job until it is answered
    job          converts its `input` to a `Call` of the HTTP API
    handler      calls the model; converts an exception to the error of a failed job
    buffer       reads the model's stream ahead while a post is running
    output       merges its chunks, and writes each as JSON once
    job_log      logs its start and its end
    result       the whole output or error, within the platform's size limit
    posts        posts progress, chunks, and the result until the platform acknowledges it

The states of one delivery of a job:

    taken -> running -> posting its result -> acknowledged
       |        |          |-> given up      after 5 minutes, or at the end of a drain
       |        |          |-> retried       the job is delivered again while its failure is being
       |        |          |                 posted: the post ends, and the new delivery runs
       |        |-> stopped                  the platform stops the job; nothing is posted
       |        |-> refused -> posting       the job still runs at the end of a drain
       |-> kept                              an earlier delivery runs; this delivery runs if the
       |                                     platform stops the earlier one
       |-> dropped                           the job's output was acknowledged a moment ago

`in_flight` chooses the state of a new delivery, `job_loop` runs it, and `posts` ends it. If the
model dies before a running job has output, `handler` runs the job once more.

`supervisor` starts the model for all waiting jobs, and once more if the model dies; `progress`
posts updates in the meantime. `sdk` wraps RunPod's SDK, whose loop drives `job_loop`. `drain` and
`backoff` compute times. `local` runs jobs without a platform, for the command line and for
`local_handler`, a function for scripts and unit tests. The model itself runs in Ray, which
`serve_app.node` starts.
"""
