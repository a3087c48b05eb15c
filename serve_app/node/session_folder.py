"""Keeps other users of the machine out of the folder of Ray's session.

Ray 2.60 makes each of its folders in /tmp/ray writable for every user (mode 0777), again with each
worker process. Another user could then take the place of a socket, and give tasks to the processes
that connect to it. `/tmp/ray` itself stays open, for the Ray of other users.
"""

from pathlib import Path

SESSION = "/session_"
"""Part of the path of a session's folder, and of those below it."""


def keep_private() -> None:
    """Makes this process create folders of Ray's sessions for this user alone."""
    from ray._common import utils

    share = utils.try_make_directory_shared

    def share_or_close(path: str) -> None:
        if SESSION in path:
            Path(path).chmod(0o700)
        else:
            share(path)

    utils.try_make_directory_shared = share_or_close
