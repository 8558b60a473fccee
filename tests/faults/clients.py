"""Programs of the command line, each a process of its own that is forked from this one, which has imported everything.

A start then takes no seconds. Standard input: a line of JSON for each, its arguments and the file that it prints to.
Standard output: its process id, and its exit status when it has ended.
"""

from __future__ import annotations

import json
import os


def serve() -> tuple[list[str], str] | None:
    """In the process of a program: its arguments and its log; None when there are no more."""
    # Unbuffered: a child must not have read what is for the next
    with open(0, "rb", buffering=0, closefd=False) as lines:
        for line in iter(lines.readline, b""):
            arguments, log = json.loads(line)
            pid = os.fork()
            if pid == 0:
                return arguments, log
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def start() -> None:
    import distributed  # noqa: F401

    import zcinfer.jobs
    import zcinfer.publishing
    import zcinfer.ray_store  # noqa: F401
    from zcinfer.cli import main

    print("ready", flush=True)
    program = serve()
    if program is None:
        return
    arguments, log = program
    os.setsid()
    for number, path in enumerate([os.devnull, log, log]):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    main(arguments, prog_name="zcinfer")


if __name__ == "__main__":
    start()
