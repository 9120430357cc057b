"""Batches are a function of (seed, step): any workers, threads, hosts and starts give the same."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS

from vit_jax.data.augment import RandAugment, RandomErasing
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.pipeline import BatchReader, DataConfig, Split, eval_batches, train_batches
from vit_jax.data.transforms import InceptionCrop, Preprocess, RandomAffine, flip
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config

ROOT = Path(__file__).parents[2]
N, BATCH, STEPS = 11, 4, 9  # three epochs and more, none of them a whole number of batches
PREPROCESS = Preprocess((6, 8), in_channels=1)


def source(n=N):
    """Every image and every label is another one."""
    images = np.random.default_rng(0).integers(1, 256, (n, 6, 8, 1), np.uint8)
    labels = np.random.default_rng(1).permutation(n).astype(np.int32)
    return ArraySource(images, labels, tuple(str(i) for i in range(n)))


def reader(seed=3, **changes):
    affine = RandomAffine(degrees=20.0, translate=0.2, scale=(0.8, 1.2))
    options = dict(preprocess=PREPROCESS, seed=seed, affine=affine, flip=True)
    return BatchReader(source(), **(options | changes))


def batches(read=None, *, start=0, stop=STEPS, size=BATCH, **options):
    with train_batches(
        read or reader(), size, start_step=start, stop_step=stop, **options
    ) as iterator:
        return list(iterator)


def stream(found, name="index"):
    return np.concatenate([batch[name] for batch in found])


def assert_same(found, expected):
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_a_batch_holds_the_examples_that_its_index_names():
    found = batches(reader(affine=None, flip=False))
    examples = source()
    assert len(found) == STEPS
    for batch in found:
        assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
            "image": ((BATCH, 6, 8, 1), np.uint8),
            "label": ((BATCH,), np.int32),
            "mask": ((BATCH,), bool),
            "index": ((BATCH,), np.int64),
            "corrupt": ((BATCH,), bool),
        }
        assert batch["mask"].all()
        np.testing.assert_array_equal(batch["image"], examples.images[batch["index"]])
        np.testing.assert_array_equal(batch["label"], examples.labels[batch["index"]])


@pytest.mark.parametrize(
    "options",
    [dict(threads=1), dict(threads=4), dict(workers=1), dict(workers=3)],
    ids=lambda options: "-".join(f"{name}{n}" for name, n in options.items()),
)
def test_workers_and_threads_change_nothing(options):
    assert_same(batches(**options), batches())
    assert not multiprocessing.active_children()  # closing ends them


def test_two_hosts_read_the_halves_of_the_batch_of_one():
    first = batches(rows=slice(0, 2))
    second = batches(rows=slice(2, 4), threads=1)
    joined = [
        {name: np.concatenate([batch[name], other[name]]) for name in batch}
        for batch, other in zip(first, second, strict=True)
    ]
    assert_same(joined, batches())


@pytest.mark.parametrize("start", [1, 3, STEPS - 1, STEPS])
def test_starting_at_a_step_is_dropping_what_came_before(start):
    assert_same(batches(start=start), batches()[start:])


def test_every_epoch_visits_every_example_once_in_its_own_order():
    index = stream(batches())
    epochs = index[: 3 * N].reshape(3, N)
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    for one, other in itertools.combinations(epochs, 2):
        assert (one != other).any()
    assert (epochs != np.arange(N)).any(axis=1).all()


def test_every_visit_augments_anew():
    found = batches()
    index, images = stream(found), stream(found, "image")
    for example in range(N):
        visits = images[index == example]
        assert len(visits) >= 3
        for one, other in itertools.combinations(visits, 2):
            assert (one != other).any()


def test_another_seed_is_another_order_and_another_augmentation():
    found, other = batches(reader(seed=3)), batches(reader(seed=4))
    assert (stream(found) != stream(other)).any()
    indices, places = np.arange(N), np.arange(N)
    one = reader(seed=3)(places, indices)["image"]
    assert (reader(seed=4)(places, indices)["image"] != one).any(axis=(1, 2, 3)).all()


@dataclasses.dataclass(frozen=True)
class FirstDraw(RandomAffine):
    """Paints an image with the first number that its generator draws."""

    def __call__(self, image, random):
        return np.full_like(image, random.integers(256))


@pytest.mark.parametrize("start", [0, 5])
def test_the_generator_of_an_example_is_seeded_by_seed_and_position(start):
    found = batches(reader(affine=FirstDraw(), flip=False), start=start)
    for step, batch in enumerate(found, start):
        for row, image in enumerate(batch["image"]):
            generator = np.random.default_rng((3, step * BATCH + row))
            assert (image == generator.integers(256)).all()


def test_a_batch_may_be_larger_than_the_source():
    index = stream(batches(size=25, stop=2))
    np.testing.assert_array_equal(np.bincount(index[: 4 * N]), [4] * N)


@pytest.mark.parametrize("size", [1, 7, N, N + 5])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_reads_every_example_once_and_pads_with_black(size, hosts):
    if size % hosts:
        size += 1
    rows = [slice(i * size // hosts, (i + 1) * size // hosts) for i in range(hosts)]
    parts = []
    for part in rows:
        with eval_batches(reader(affine=None, flip=False), size, rows=part) as iterator:
            parts.append(list(iterator))
    assert {len(found) for found in parts} == {-(-N // size)}
    found = [batch for step in zip(*parts, strict=True) for batch in step]
    assert {len(batch["index"]) for batch in found} == {size // hosts}

    index, mask = stream(found), stream(found, "mask")
    padding = -N % size
    assert index.tolist() == [*range(N), *[-1] * padding]
    np.testing.assert_array_equal(mask, np.arange(len(index)) < N)
    images, labels = stream(found, "image"), stream(found, "label")
    np.testing.assert_array_equal(images[:N], source().images)
    np.testing.assert_array_equal(labels[:N], source().labels)
    assert images[:N].any(axis=(1, 2, 3)).all()
    assert not images[N:].any()


def test_images_are_brought_to_the_size_and_channels_of_the_model():
    preprocess = Preprocess((3, 4), in_channels=3, resize="area")
    read = BatchReader(source(), preprocess)
    found = read(np.array([0, 1]), np.array([9, -1]))
    means = source().images[9, :, :, 0].reshape(3, 2, 4, 2).mean(axis=(1, 3))
    assert np.abs(found["image"][0].astype(float) - means[..., None]).max() <= 0.5
    assert found["image"].shape == (2, 3, 4, 3)
    assert found["mask"].tolist() == [True, False]


FLOAT = Preprocess((4, 5), 1, aspect="keep", crop=0.9, resize_dtype="float32", mean=0.3, std=0.2)


def test_evaluation_carries_float32_pixels_where_the_model_resizes_in_it():
    with eval_batches(BatchReader(source(), FLOAT), 7) as iterator:
        found = list(iterator)
    images = stream(found, "image")
    assert images.dtype == np.float32 and images.shape == (14, 4, 5, 1)
    for image, original in zip(images, source().images, strict=False):
        np.testing.assert_array_equal(FLOAT.normalise(image), FLOAT(original))
    assert not images[N:].any()


def test_training_carries_uint8_whatever_the_model_resizes_in():
    found = batches(reader(preprocess=FLOAT))
    assert {batch["image"].dtype for batch in found} == {np.dtype(np.uint8)}
    rounded = dataclasses.replace(FLOAT, resize_dtype="uint8")
    assert_same(found, batches(reader(preprocess=rounded)))
    assert_same(found, batches(reader(preprocess=FLOAT), workers=1))


def test_a_split_resizes_by_its_own_rule_or_the_model_s():
    base = dataclasses.replace(FLOAT, resize="area")
    assert Split("digits", "val").preprocess(base) == base
    changed = Split("digits", "val", resize="bicubic_antialias").preprocess(base, (4, 6))
    assert changed == dataclasses.replace(base, resize="bicubic_antialias", image_size=(4, 6))
    changed = Split("digits", "val", aspect="squash", crop=0.5).preprocess(base)
    assert changed == dataclasses.replace(base, aspect="squash", crop=0.5)
    with pytest.raises(UserError, match=r"data crop is 0\.0"):
        Split("digits", "val", crop=0.0).preprocess(base)


@pytest.mark.parametrize("workers, threads", [(-1, 2), (0, 0)])
def test_a_number_of_workers_that_cannot_be_is_refused(workers, threads):
    with pytest.raises(UserError, match=f"data.workers is {workers} and data.threads {threads}"):
        DataConfig(Split("digits", "train"), workers=workers, threads=threads)


READING = """
import multiprocessing, time
import numpy as np
from vit_jax.data.pipeline import BatchReader, train_batches
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.transforms import Preprocess

if __name__ == "__main__":
    source = ArraySource(np.zeros((5, 4, 4, 1), np.uint8), np.zeros(5, np.int32), ("a",))
    read = BatchReader(source, Preprocess((4, 4), 1))
    with train_batches(read, 2, start_step=0, stop_step=10**9, workers=2) as batches:
        for _ in range(4):  # comes from both workers
            next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(600)
"""

# A worker takes seconds to start, and its parent may not live that long.
STARTING = """
import multiprocessing, os, time
from vit_jax.data.pipeline import end_with

def work():
    parent = os.getppid()
    print(os.getpid(), flush=True)
    while os.getppid() == parent:
        time.sleep(0.05)
    end_with(parent, 0, 1)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(600)
"""


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # nobody may be there to collect an orphan that has ended


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "script, count",
    [
        pytest.param(READING, 2, id="reading"),
        pytest.param(STARTING, 1, id="starting"),
    ],
)
def test_worker_processes_end_with_a_parent_that_is_killed(tmp_path, script, count):
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    workers = []
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == count and all(alive(pid) for pid in workers)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 15
        while any(alive(pid) for pid in workers) and time.monotonic() < end:
            time.sleep(0.1)
        assert not [pid for pid in workers if alive(pid)]
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for pid in workers:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_augmentations_follow_one_another_with_one_generator():
    """Crop, flip, RandAugment, erasing, each drawing from where the one before it stopped."""
    preprocess = Preprocess((6, 8), in_channels=1, mean=0.3, std=0.1)
    crop, augment = InceptionCrop(), RandAugment(2, 15)
    read = BatchReader(
        source(), preprocess, 3, crop, flip=True, rand_augment=augment, erasing=0.9, replace=True
    )
    found = read(np.arange(100, 100 + N), np.arange(N))
    for row, image in enumerate(source().images):
        random = np.random.default_rng((3, 100 + row))
        expected = preprocess.pixels(crop(image, random))
        expected = augment(flip(expected, random), random)
        expected = RandomErasing(0.9, mean=0.3, std=0.1)(expected, random)
        np.testing.assert_array_equal(found["image"][row], expected)


def test_flags_reach_the_augmentations():
    flags = ["rand_augment.layers=2", "rand_augment.magnitude=15", "erasing=0.25"]
    flags += ["inception_crop.area=(0.08,1.0)", "jpeg=fast"]
    config = load_config(DIGITS, [f"--config.data.train.{flag}" for flag in flags])
    assert config.data.train.rand_augment == RandAugment(2, 15)
    assert config.data.train.inception_crop == InceptionCrop((0.08, 1.0))
    assert (config.data.train.erasing, config.data.train.jpeg) == (0.25, "fast")
    with pytest.raises(UserError, match=r"data\.val is evaluated as it is: rand_augment"):
        load_config(DIGITS, ["--config.data.val.rand_augment.layers=1"])
    with pytest.raises(UserError, match=r"probability is 2\.0"):
        load_config(DIGITS, ["--config.data.train.erasing=2.0"])
