"""Makes the faults of faults.toml, one after another, and runs the tests that must catch them.

    python tests/faults.py [--only=SUBSTRING] [--jobs=2]

All is done in a copy of the tracked files. Ends with 1 where a fault lives or cannot be made, or
where tests fail without any.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAULTS = tomllib.loads((ROOT / "tests" / "faults.toml").read_text())["fault"]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "vit_jax").rglob("*.py")
}


def place(fault):
    """The file that a fault is made in, None where there is not exactly one place for it."""
    found = [path for path, text in SOURCES.items() for _ in range(text.count(fault["before"]))]
    return found[0] if len(found) == 1 else None


def room(path):
    """The part of the package that a file is in: models, data/forms, ..."""
    return os.path.dirname(path).removeprefix("vit_jax").strip("/")


def title(fault):
    return f"{room(place(fault) or '') or 'others'}: {fault['name']}"


def copy_of_tracked(folder):
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def passes(folder, tests):
    """Whether the tests pass in a copy; raises where pytest could not run any."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    env["JAX_COMPILATION_CACHE_DIR"] = cache  # what is compiled for one copy serves all
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        [*command, "-m", "not slow"], cwd=folder, env=env, capture_output=True, text=True
    )
    if done.returncode not in (0, 1, 2):  # 2: a module that cannot even be imported
        raise RuntimeError(f"{' '.join(tests)}: pytest says\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help='such as "launch:" or a part of a name')
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if args.only in title(fault)]
    folders, wrong = queue.SimpleQueue(), 0
    counts = collections.defaultdict(collections.Counter)

    def sound(tests):
        folder = folders.get()
        try:
            return passes(folder, tests)
        finally:
            folders.put(folder)

    def caught(fault):
        began, path = time.monotonic(), place(fault)
        if path is None:
            return "does not apply", 0.0
        folder = folders.get()
        try:
            text = SOURCES[path].replace(fault["before"], fault["after"])
            (folder / path).write_text(text)
            compile(text, path, "exec")  # a fault is a program all the same
            verdict = "LIVES" if passes(folder, fault["tests"]) else "caught"
        finally:
            (folder / path).write_text(SOURCES[path])
            folders.put(folder)
        return verdict, time.monotonic() - began

    with (
        tempfile.TemporaryDirectory(prefix="faults-") as temporary,
        concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
    ):
        for number in range(args.jobs):
            folder = pathlib.Path(temporary, str(number))
            copy_of_tracked(folder)
            folders.put(folder)
        try:
            distinct = list(dict.fromkeys(tuple(fault["tests"]) for fault in chosen))
            for tests, good in zip(distinct, pool.map(sound, distinct), strict=True):
                if not good:
                    wrong += 1
                    print("FAILS without a fault:", *tests, flush=True)
            for fault, (verdict, seconds) in zip(chosen, pool.map(caught, chosen), strict=True):
                counts[title(fault).partition(":")[0]][verdict] += 1
                wrong += verdict != "caught"
                print(f"{verdict:14} {seconds:5.1f} s  {title(fault)}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    for where, found in counts.items():
        print(f"{where}: {', '.join(f'{n} {verdict}' for verdict, n in found.items())}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(chosen)} faults, {used.ru_utime + used.ru_stime:.0f} s of processor time")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
