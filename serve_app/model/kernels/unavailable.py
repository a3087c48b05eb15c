"""StepUnavailable: the reason why a compiled step, or its captured graphs, cannot be used."""


class StepUnavailable(Exception):
    """The message is a phrase for the runner's note in `/health`. A slower implementation is used
    instead."""
