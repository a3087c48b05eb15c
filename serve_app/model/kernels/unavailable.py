"""StepUnavailable: the reason why a compiled step, or its captured graphs, cannot be used."""


class StepUnavailable(Exception):
    """A compiled step cannot be used, and a slower implementation replaces it.

    The message is a phrase for the runner's note in `/health`.
    """
