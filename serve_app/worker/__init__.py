"""RunPod jobs: taken, run and answered. Knows no tokens, and not how a model is started.

Read `start.py` first, which puts the parts together. Then follow a job:

    take, taken        a poll brings deliveries; each is run once, and remembered until answered
    sdk                JobLoop, from a take to the last post: the only module inside the SDK's loop
    job                its `input` becomes the `Call` that it means
    handler            the call's answer, or its error, as values to post
    boot, progress     the model's one start, which all jobs share, and what they hear meanwhile
    delivery           a stream's chunks, merged while a post is under way
    results, post      the terminal body, posted until the platform has it
    stops, drain       what ends a job early: a cancel, or the end of the worker
    sdk_import         the SDK's import, without the second that it wastes

`local.py` runs one job from the command line instead. The model is `serve_app.node`'s.
"""
