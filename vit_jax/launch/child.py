"""Becomes the command it is given, on the cores it is given, and ends when its parent is gone.

    python -I -S child.py PARENT CORES COMMAND...

A script of its own, for a process with threads must run no Python between fork and exec.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, cores: list[int], command: list[str]) -> None:
    """Becomes `command`, on these cores (none: all), and ends with the process `parent`."""
    if sys.platform == "linux":
        # What cannot be caught: a run that was killed goes on from its last checkpoint, and the
        # next sweep must not find the run folder in use. It stays set in what is executed below.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before it was set
            sys.exit(143)
        if cores:
            os.sched_setaffinity(0, cores)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(core) for core in sys.argv[2].split(",") if core], sys.argv[3:])
