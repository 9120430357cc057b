"""Images a second from files to augmented batches: ours, tf.data and a bare loop, side by side.

    python experiments/benchmarks/input.py [--tf-python=PATH] [--images=2048] [--rounds=5]

All decode JPEG files of ImageNet's size, cut a random box out (Inception's: 5 to 100% of the area,
3/4 to 4/3 wide), resize it to 224 x 224, mirror half of them and make uint8 batches of 128. Each
contestant is a process of its own, stopped (SIGSTOP) while another has its turn; they take turns
in every round, and ratios are taken within a round. PATH is a Python in which
`pip install tensorflow-cpu` was run; without it tf.data's rows are left empty.
"""

import argparse
import collections
import datetime
import glob
import importlib.metadata
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SIZE, BATCH, CLASSES = 224, 128, 10
AREA, RATIO = (0.05, 1.0), (3 / 4, 4 / 3)
CONTESTANTS = {  # name in the table: what its process is asked for
    "tf.data, files": "tf:files",
    "ours, files": "folder:files",
    "ours, records": "records:as_they_are",
    "ours, records, short side 256": "records:256",
    "ours, records, short side 256, quality 90": "records:256q90",
    "bare loop, one core": "bare",
    "fractals of 64 x 64, one core": "fractals:classes=1000,size=64",
    "fractals of 224 x 224, one core": "fractals:classes=1000,size=224",
}
CONVERSIONS = {
    "as_they_are": {},
    "256": {"short_side": 256},
    "256q90": {"short_side": 256, "quality": 90},
}
TF, BARE = "tf.data, files", "bare loop, one core"
PACKAGES = ("numpy", "grain", "simplejpeg", "opencv-python-headless", "array_record")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tf-python", help="a Python in which tensorflow-cpu is installed")
    parser.add_argument("--data", help="a folder that keeps the files for the next run")
    parser.add_argument("--images", type=int, default=2048, help="how many, also of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.data, args.images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(args.data or temporary, str(args.images))
        measure(args, folder, make(folder, args.images))


# The parent: data, turns, the table.


def make(folder: str, images: int) -> dict[str, float]:
    """Writes the images and the shards, unless they are there; returns the KB of an image."""
    from vit_jax.data.prepare import Conversion, prepare

    files = write_files(folder, images)
    sizes = {"files": sum(map(os.path.getsize, paths_of(folder)))}
    for name, fields in CONVERSIONS.items():
        made = prepare(files, os.path.join(folder, name), conversion=Conversion(**fields))
        sizes[name] = sum(shard["record_bytes"] for shard in made["shards"])
    return {name: size / images / 1e3 for name, size in sizes.items()}


def write_files(folder: str, images: int) -> str:
    """Writes the images in a folder for each class, unless they are there; returns where."""
    import simplejpeg

    files = os.path.join(folder, "files")
    for label in range(CLASSES):
        os.makedirs(os.path.join(files, f"class{label}"), exist_ok=True)

    def write(number):
        data = simplejpeg.encode_jpeg(picture(number), 92 + number % 4, colorsubsampling="420")
        with open(os.path.join(files, f"class{number % CLASSES}/{number:06}.jpg"), "wb") as file:
            file.write(data)

    if len(paths_of(folder)) < images:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, range(images)))
    return files


def paths_of(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(folder, "files/*/*.jpg")))


def picture(seed: int) -> Any:
    """uint8 [h w 3] of about 375 x 500: noise with the spectrum of photographs."""
    import numpy as np

    random, n = np.random.default_rng(seed), 540
    h, w = random.integers((350, 470), (401, 531)).tolist()
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
    spectrum = np.fft.rfft2(random.standard_normal((3, n, n), np.float32))
    planes = np.fft.irfft2(spectrum / np.maximum(frequency, 1 / n) ** 1.3, (n, n))[:, :h, :w]
    light, red, blue = planes / planes.std() * random.uniform(35, 55) * [[[1]], [[0.25]], [[0.25]]]
    image = 128 + np.stack([light + red, light - red / 2 - blue / 4, light + blue], -1)
    return image.clip(0, 255).astype(np.uint8)


class Server:
    """A process that works when it is its turn, and is stopped in between."""

    def __init__(self, python: str, what: str, folder: str, images: int):
        command = [python, __file__, f"--serve={what}", f"--data={folder}", f"--images={images}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.first = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def turn(self) -> list[float]:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        with self.process:
            self.process.kill()


def measure(args: argparse.Namespace, folder: str, sizes: dict[str, float]) -> None:
    """Prints the machine, the table and the memory."""
    load, versions = (
        os.getloadavg()[0],
        {name: importlib.metadata.version(name) for name in PACKAGES},
    )
    servers, rounds = {}, []
    try:
        for name in args.contestants:
            what = CONTESTANTS[name]
            if python := args.tf_python if what.startswith("tf") else sys.executable:
                servers[name] = Server(python, what, folder, args.images)
        for number in range(args.rounds):
            order = list(servers)[:: -1 if number % 2 else 1]
            rounds.append({name: servers[name].turn() for name in order})
        versions["tensorflow"] = servers[TF].first if TF in servers else "none"
        servers["memory"] = Server(sys.executable, "memory", folder, args.images)
        memory = "{:.0f} MiB after one epoch, {:.0f} after two, at most {:.0f}"
        memory = memory.format(*servers["memory"].first)
    finally:
        for server in servers.values():
            server.end()
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{datetime.date.today()}, {device()}, load average {load:.1f} at the start,")
    print(f"Python {platform.python_version()}, {told};")
    print(f"{args.rounds} rounds of {args.images} images.\n")
    print(f"| contestant | KB | images/s | CPU ms | / tf.data | / {cores()} bare |\n{'|---' * 6}|")
    for name in args.contestants:
        key = CONTESTANTS[name].split(":")[-1]
        cells = [name, f"{sizes[key]:.0f}" if key in sizes else ""]
        if name in servers:
            forms = (".0f", ".2f")
            cells += [spread([r[name][i] for r in rounds], form) for i, form in enumerate(forms)]
        else:
            cells += ["needs --tf-python", ""]
        for base, times in ((TF, 1), (BARE, cores())):
            compared = "one core" not in name and name != base and {name, base} <= set(servers)
            ratios = [r[name][0] / r[base][0] / times for r in rounds if compared]
            cells.append(spread(ratios, ".2f") if ratios else "")
        print(f"| {' | '.join(cells)} |")
    print(f"\nResident memory of `ours, files`: {memory}.")


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def cores() -> int:
    return len(os.sched_getaffinity(0))


def device() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {cores()} cores"


# The contestants' processes.


def serve(what: str, folder: str, images: int) -> None:
    """Prints a first line once it has warmed up, then images/s for every line it reads."""
    kind, _, argument = what.partition(":")
    first, turn = None, -(-images // BATCH)
    if what == "memory":
        first, batches = memory(ours("folder", "files", folder), turn), iter(())
    elif kind == "tf":
        first, batches = tf_data(folder)
    elif kind == "fractals":
        batches, turn = fractals(what), -(-turn // 4)
    else:
        batches = bare(folder) if kind == "bare" else ours(kind, argument, folder)
    run(batches, turn + 2)  # one turn, in which tf.data finds its number of threads
    print(json.dumps(first), flush=True)
    for _ in sys.stdin:
        run(batches, 2)
        start = time.perf_counter(), time.process_time()
        run(batches, turn)
        seconds, busy = time.perf_counter() - start[0], time.process_time() - start[1]
        print(json.dumps([turn * BATCH / seconds, busy / turn / BATCH * 1e3]), flush=True)


def run(batches: Iterator[Any], n: int) -> None:
    collections.deque(itertools.islice(batches, n), maxlen=0)


def ours(kind: str, name: str, folder: str) -> Iterator[Any]:
    """Our batches, without end."""
    from vit_jax.data.pipeline import BatchReader, train_batches
    from vit_jax.data.sources import open_source
    from vit_jax.data.transforms import InceptionCrop, Preprocess

    split = "all" if kind == "folder" else "train"
    source = open_source(f"{kind}:{os.path.join(folder, name)}", split)
    preprocess, crop = Preprocess((SIZE, SIZE), jpeg="fast"), InceptionCrop(AREA, RATIO)
    read = BatchReader(source, preprocess, inception_crop=crop, flip=True)
    with train_batches(read, BATCH, start_step=0, stop_step=10**9) as batches:
        yield from batches


def memory(batches: Iterator[Any], epoch: int) -> tuple[float, float, float]:
    """Resident MiB after one epoch and after two, and the most, looked at after every batch."""
    seen = []
    for _ in itertools.islice(batches, 2 * epoch):
        with open("/proc/self/statm") as file:
            seen.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return seen[epoch - 1], seen[-1], max(seen)


def fractals(spec: str) -> Iterator[Any]:
    """Batches of fractals on this thread; the classes' systems are drawn before the first."""
    import numpy as np

    from vit_jax.data.forms.fractals import system
    from vit_jax.data.pipeline import BatchReader
    from vit_jax.data.sources import open_source
    from vit_jax.data.transforms import Preprocess

    source = open_source(spec, "train")
    for label in range(source.classes):
        system(source.seed, label)
    read = BatchReader(source, Preprocess((source.size, source.size)))
    for step in itertools.count():
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        yield read(positions, positions, threads=1)


def bare(folder: str) -> Iterator[Any]:
    """What must be done and no more: one thread, one array for all batches, no order, no labels."""
    import cv2
    import numpy as np
    import simplejpeg

    from vit_jax.data.transforms import InceptionCrop

    cv2.setNumThreads(1)
    random, crop = np.random.default_rng(0), InceptionCrop(AREA, RATIO)
    paths, batch = itertools.cycle(paths_of(folder)), np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
    while True:
        for row in batch:
            with open(next(paths), "rb") as file:
                image = simplejpeg.decode_jpeg(file.read(), "RGB", fastdct=True)
            top, left, h, w = crop.box(*image.shape[:2], random)
            cv2.resize(image[top : top + h, left : left + w], (SIZE, SIZE), dst=row)
            if random.random() < 0.5:
                cv2.flip(row, 1, dst=row)
        yield batch


def tf_data(folder: str) -> tuple[str, Iterator[Any]]:
    """TensorFlow's version, and tf.data's batches, without end."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    def load(path, label):
        data = tf.io.read_file(path)
        start, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.0,
            aspect_ratio_range=RATIO,
            area_range=AREA,
            max_attempts=100,
        )
        image = tf.io.decode_and_crop_jpeg(data, tf.concat([start[:2], size[:2]], 0), channels=3)
        image = tf.cast(tf.image.resize(image, (SIZE, SIZE)), tf.uint8)
        return tf.image.random_flip_left_right(image), label

    paths, auto = paths_of(folder), tf.data.AUTOTUNE
    labels = [int(path.split(os.sep)[-2].removeprefix("class")) for path in paths]
    data = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
    options = tf.data.Options()
    options.deterministic = False
    batches = (
        data.map(load, auto).batch(BATCH, drop_remainder=True).prefetch(auto).with_options(options)
    )
    return tf.__version__, batches.as_numpy_iterator()


if __name__ == "__main__":
    main()
