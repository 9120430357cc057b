"""Commands of vit_jax in processes of their own, which can be killed; started in a fraction of a
second, as forks of one that has imported everything and touched no device."""

import atexit
import itertools
import logging
import multiprocessing
import os
import pathlib
import signal
import socket
import sys

ROOT = pathlib.Path(__file__).parents[1]
_NUMBERS = itertools.count()
_CONTEXT = multiprocessing.get_context("forkserver")


def run_forks_of(*modules):
    """Starts the process that the others are forks of."""
    from multiprocessing import forkserver

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    _CONTEXT.set_forkserver_preload(["processes", *modules])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def save_arrays_whole():
    """Has Orbax save an array whole, where it would compile a slice of each for every device."""
    import jax
    import orbax.checkpoint as ocp

    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class Command:
    """A process of `python -m vit_jax ARGV`, or of a text of Python.

    Args:
      dies: how it ends itself, if at all: (signal, "step" or "save", number of the step).
    """

    def __init__(self, folder, argv, *, devices=8, dies=None, cwd=None, text=None, **env):
        from conftest import QUICK

        late = ("grain.experimental", "orbax.checkpoint", "scipy.ndimage")  # imported when used
        run_forks_of("vit_jax.__main__", "vit_jax.analysis.plots", "vit_jax.training.loop", *late)
        self.files = [folder / f"{name}{next(_NUMBERS)}" for name in ("out", "err")]
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {QUICK}"
        arguments = ([str(arg) for arg in argv], text, dies, cwd, env, self.files)
        self.process = _CONTEXT.Process(target=_run, args=arguments)
        self.process.start()

    def finish(self, code=0):
        """Waits for its end; returns what it wrote to stdout and to stderr."""
        self.process.join(240)
        out, err = (file.read_text() for file in self.files)
        assert self.process.exitcode == code, (self.process.exitcode, err)
        return out, err

    def kill(self):
        self.process.kill()
        self.process.join()


def address():
    """Where a coordinator may listen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _run(argv, text, dies, cwd, env, files):
    os.environ.update(env)
    os.environ["PYTHONPATH"] = str(ROOT)  # of workers that it starts
    for number, file in enumerate(files, 1):
        target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
    if cwd:
        os.chdir(cwd)
    if dies:
        die_at(*dies)
    sys.argv[1:] = argv
    code = 0
    if text:
        exec(compile(text, "text", "exec"), {"__name__": "__main__"})
    else:
        from vit_jax.__main__ import main, set_up_screen

        logging.root.handlers.clear()  # of what was imported
        if not any(arg.startswith("--coordinator=") for arg in argv):
            save_arrays_whole()
        set_up_screen()
        code = main(argv)
    sys.stdout.flush()
    atexit._run_exitfuncs()  # as an interpreter does at its end, and multiprocessing does not
    os._exit(code)


def die_at(number, what, step, patch=setattr):
    """Sends this process a signal once it has begun a step, or while it saves one."""
    from vit_jax.checkpoints.store import Store
    from vit_jax.training.metrics import Recorder

    def then(done, *_):
        if done == step:
            os.kill(os.getpid(), number)

    if what == "step":
        record = Recorder.step

        def step_and_die(self, done, *args):
            record(self, done, *args)
            then(done)

        patch(Recorder, "step", step_and_die)
    else:
        commit = Store._commit

        def die_and_commit(self, path):  # while Orbax writes, in another thread
            then(int(path.name))
            commit(self, path)

        patch(Store, "_commit", die_and_commit)


SIGINT, SIGKILL, SIGTERM = signal.SIGINT, signal.SIGKILL, signal.SIGTERM
