"""The program of a client, for tests: one feature works, one fails, and one ends the program."""

import os

from benchmarks.clients.features import Server, feature, main


@feature
def plain_text(server: Server) -> None:
    assert server.v1 == "http://server/v1"
    assert server.key == "key"


@feature
async def wrong_answer(server: Server) -> None:
    answer = server.model
    assert answer == "other"


@feature
def crash(server: Server) -> None:
    os._exit(7)


@feature
def never_tried(server: Server) -> None:
    pass


if __name__ == "__main__":
    main()
