"""Makes the faults of faults.toml, one after another, and runs the tests that must catch them.

    python tests/faults.py [--only=SUBSTRING] [--jobs=2]

All is done in copies of the tracked files. Ends with 1 where a fault lives or cannot be made, or
where tests fail without any.
"""

import argparse
import collections
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAULTS = tomllib.loads((ROOT / "tests" / "faults.toml").read_text())["fault"]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "vit_jax").rglob("*.py")
}
LIMIT = 900  # seconds of a run: a fault that makes a program wait for ever is caught


def place(fault):
    """The file that a fault is made in, None where there is not exactly one place for it."""
    found = [path for path, text in SOURCES.items() for _ in range(text.count(fault["before"]))]
    return found[0] if len(found) == 1 else None


def room(path):
    """The part of the package that a file is in: models, data/forms, ..."""
    return os.path.dirname(path).removeprefix("vit_jax").strip("/")


def title(fault):
    return f"{room(place(fault) or '') or 'others'}: {fault['name']}"


def copied(folder):
    """The tracked files in a folder, which is returned."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def write(path, text):
    """Writes a module, and removes what Python has compiled of it: times may be the same."""
    path.write_text(text)
    for old in path.parent.glob(f"__pycache__/{path.stem}.*"):
        old.unlink()


def import_what_all_need():
    """Once, for all runs, which are forks: it would be more than half of their time."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # as conftest.py has it
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    import cv2, flax.nnx, grain, hypothesis, jax, optax, orbax.checkpoint, pytest  # noqa: E401, F401, I001
    import scipy.ndimage, scipy.stats  # noqa: E401, F401


def start(folder, tests):
    """Runs tests in a copy; returns the process, which ends with pytest's exit code."""
    if process := os.fork():
        return process
    os.setsid()  # Ctrl-C is for the parent, which ends the whole group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(LIMIT)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    with open(folder.with_suffix(".log"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 3
    try:
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests])
    finally:
        os._exit(code)


def verdicts(faults, folders):
    """Yields (fault, exit code, output, processor time), as many at a time as there are copies.

    A fault without `before` is none.
    """
    left, running = list(faults), {}
    try:
        while left or running:
            if left and folders:
                fault, folder = left.pop(0), folders.pop()
                if "before" in fault:
                    path = place(fault)
                    write(folder / path, SOURCES[path].replace(fault["before"], fault["after"]))
                running[start(folder, fault["tests"])] = fault, folder
                continue
            process, status, used = os.wait4(-1, 0)
            fault, folder = running.pop(process)
            if "before" in fault:
                write(folder / place(fault), SOURCES[place(fault)])
            folders.append(folder)
            output = folder.with_suffix(".log").read_text(errors="replace")
            seconds = used.ru_utime + used.ru_stime
            yield fault, os.waitstatus_to_exitcode(status), output, seconds
    finally:
        for process in running:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help='such as "launch:" or a part of a name')
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if args.only in title(fault)]
    if not chosen:
        parser.error(f"no fault has {args.only!r} in its room or name")
    counts, together, wrong = collections.defaultdict(collections.Counter), 0.0, 0
    for fault in [fault for fault in chosen if place(fault) is None]:
        chosen.remove(fault)
        wrong += 1
        print(f"does not apply  {fault['name']}", flush=True)
    import_what_all_need()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folders = [copied(pathlib.Path(temporary, str(i))) for i in range(args.jobs)]
        sound = [{"tests": tests} for tests in dict.fromkeys(tuple(f["tests"]) for f in chosen)]
        for fault, code, output, seconds in verdicts([*sound, *chosen], folders):
            together += seconds
            if "before" not in fault:
                if code != 0:
                    wrong += 1
                    told = output.strip().splitlines()[-3:]  # which test, if pytest got so far
                    print("FAILS without a fault:", *fault["tests"], *told, sep="\n  ", flush=True)
                continue
            verdict = {0: "LIVES", 3: "no tests", 4: "no tests", 5: "no tests"}.get(code, "caught")
            counts[title(fault).partition(":")[0]][verdict] += 1
            wrong += verdict != "caught"
            print(f"{verdict:8} {seconds:5.1f} s  {title(fault)}", flush=True)
    for where, found in counts.items():
        print(f"{where}: {', '.join(f'{n} {verdict}' for verdict, n in found.items())}")
    print(f"{len(chosen)} faults, {together:.0f} s of processor time")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
