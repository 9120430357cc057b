"""Images a second out of shards in a bucket, by the time that each request takes.

    python experiments/benchmarks/buckets.py [--examples=2000] [--demand=150]

In a round, each of these reads all images once, in shuffled batches as `train` does (decoded, a
random crop, 224 pixels): a local disk, and a bucket whose store waits 0, 20 and 50 ms before each
answer; at full speed, and for a consumer that takes `demand` images a second, as a device would.
The store is fake-gcs-server behind the tests' proxy, processes of this machine: they take processor
time, so at full speed a bucket is compared with itself at 0 ms. Needs the extra `test`.
"""

import argparse
import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from input import device, picture, spread

TESTS = Path(__file__).resolve().parents[2] / "tests"
LATENCIES = (0.0, 0.02, 0.05)  # seconds
SERVER = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import servers
with servers.google(servers.Faults(latency=float(sys.argv[1]))) as found:
    print(found["STORAGE_EMULATOR_HOST"], flush=True)
    sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--demand", type=float, default=150.0, help="images/s")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows = measure(args)
    print(f"{datetime.date.today()}, {device()}, load average {load:.1f} at the start,")
    print(f"{args.examples} JPEGs, batches of {args.batch_size}, {args.rounds} rounds, median\n")
    print("| where | images/s | / disk | / bucket at 0 ms | waiting, "
          f"at {args.demand:g} images/s |")  # fmt: skip
    print("|---" * 5 + "|")
    for name, found in rows.items():
        full, waits = zip(*found, strict=True)
        cells = [name, spread(full, ".0f")]
        for base in ("disk", "bucket, 0 ms"):
            ratios = [a / b for a, (b, _) in zip(full, rows[base], strict=True)]
            cells.append(spread(ratios, ".3f"))
        print(f"| {' | '.join([*cells, spread(waits, '.1%')])} |")


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Of each place and round, images/s and the share of its time that a consumer waits."""
    from vit_jax.data.images import encode
    from vit_jax.data.prepare import prepare
    from vit_jax.objects import Objects

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for i in range(args.examples):
            path = Path(folder, "images", str(i % 10), f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture(i % 100), 90))
        prepare(f"{folder}/images", f"{folder}/shards", shard_examples=500)
        os.environ["VIT_JAX_CACHE"] = f"{folder}/cache"
        places = {"disk": ("", f"records:{folder}/shards")}
        for latency in LATENCIES:
            url = stack.enter_context(store(latency))
            environment(url)
            bucket = Objects(f"gs://runs/{latency * 1000:.0f}")
            for path in Path(folder, "shards").iterdir():
                if path.is_file():
                    bucket.replace(path.name, path.read_bytes())
            places[f"bucket, {latency * 1000:.0f} ms"] = url, f"records:{bucket.url}"
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
        for _ in range(args.rounds):
            for name, (url, spec) in places.items():
                environment(url)
                found[name].append((read(spec, args, None)[0], read(spec, args, args.demand)[1]))
    return found


@contextlib.contextmanager
def store(latency: float) -> Iterator[str]:
    """A store in a process of its own; yields its address."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SERVER, str(latency)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()


def environment(url: str) -> None:
    """Leads this process to a store."""
    from vit_jax.data import storage

    os.environ |= {"TENSORSTORE_GCS_HTTP_URL": url, "STORAGE_EMULATOR_HOST": url}
    for known in (storage._listed, storage._bucket, storage._start):
        known.cache_clear()


def read(spec: str, args: argparse.Namespace, demand: float | None) -> tuple[float, float]:
    """Images/s from the second batch on, and the share of the time in which none was there."""
    from vit_jax.data.config import Split
    from vit_jax.data.pipeline import BatchReader, train_batches
    from vit_jax.data.sources import open_source
    from vit_jax.data.transforms import InceptionCrop, Preprocess

    split = Split(spec, "train", inception_crop=InceptionCrop(), flip=True)
    reader = BatchReader.of(open_source(spec, "train"), split, Preprocess((224, 224)))
    steps, waited, began = args.examples // args.batch_size, 0.0, None
    with train_batches(reader, args.batch_size, start_step=0, stop_step=steps) as batches:
        for step in range(steps):
            asked = time.perf_counter()
            next(batches)
            if began is None:
                began = time.perf_counter()
                continue
            waited += time.perf_counter() - asked
            if demand:
                time.sleep(max(began + step * args.batch_size / demand - time.perf_counter(), 0))
    took = time.perf_counter() - began
    return (steps - 1) * args.batch_size / took, waited / took


if __name__ == "__main__":
    main()
