"""Runs a command on given cores, and is killed when its parent process dies.

    python -I -S child.py PARENT CORES COMMAND...

A separate script, as a process with threads must run no Python between fork and exec.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, cores: list[int], command: list[str]) -> None:
    """Replaces this process by `command`, on these cores (none: all), tied to `parent`'s life."""
    if sys.platform == "linux":
        # SIGKILL, which cannot be caught: a killed run resumes from its last checkpoint, and the
        # next sweep must not find the run folder in use. The setting survives exec.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before it was set
            sys.exit(143)
        if cores:
            os.sched_setaffinity(0, cores)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(core) for core in sys.argv[2].split(",") if core], sys.argv[3:])
