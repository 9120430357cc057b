"""Batches are a function of (seed, step): any workers, threads, hosts and starts give the same."""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, ROOT
from made import refused, saved

from vit_jax.data import ahead
from vit_jax.data.augment import RandAugment, RandomErasing
from vit_jax.data.config import DataConfig, Split
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.pipeline import BatchReader, eval_batches, train_batches
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import InceptionCrop, Preprocess, RandomAffine, flip
from vit_jax.errors import UserError
from vit_jax.training.config_file import load_config

N, BATCH, STEPS = 11, 4, 9  # three epochs and more, none of them a whole number of batches
PREPROCESS = Preprocess((6, 8), in_channels=1)
FLOAT = Preprocess((4, 5), 1, aspect="keep", crop=0.9, resize_dtype="float32", mean=0.3, std=0.2)


@functools.cache
def source():
    """Every image and every label is another one."""
    images = np.random.default_rng(0).integers(1, 256, (N, 6, 8, 1), np.uint8)
    labels = np.random.default_rng(1).permutation(N).astype(np.int32)
    return ArraySource(images, labels, tuple(str(i) for i in range(N)))


def reader(seed=3, of=None, **changes):
    affine = RandomAffine(degrees=20.0, translate=0.2, scale=(0.8, 1.2))
    options = dict(preprocess=PREPROCESS, seed=seed, affine=affine, flip=True)
    return BatchReader(of or source(), **(options | changes))


def batches(read=None, *, start=0, stop=STEPS, size=BATCH, **options):
    read = read or reader()
    with train_batches(read, size, start_step=start, stop_step=stop, **options) as iterator:
        return list(iterator)


@functools.cache
def usual():
    return batches()


def stream(found, name="index"):
    return np.concatenate([batch[name] for batch in found])


def assert_same(found, expected):
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_a_batch_holds_the_examples_that_its_index_names():
    found, examples = batches(reader(affine=None, flip=False), stop=3), source()
    assert len(found) == 3
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


def test_threads_hosts_and_starts_change_nothing():
    assert_same(batches(threads=4), usual())
    first, second = batches(rows=slice(0, 2)), batches(rows=slice(2, 4), threads=1)
    halves = zip(first, second, strict=True)
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in halves]
    assert_same(joined, usual())
    for start in (5, STEPS - 1, STEPS):
        assert_same(batches(start=start), usual()[start:])


OWN = """
import pathlib

FILES = sorted(pathlib.Path(__file__).parent.glob("*.png"))

class Own:
    label_names, fingerprint = ("a", "b"), "1"
    def __len__(self): return len(FILES)
    def __getitem__(self, i):
        return {"image": FILES[i].read_bytes(), "label": i % 2, "name": f"photo {i}"}

def own(split): return Own()
"""


def test_worker_processes_give_the_same_and_pass_their_errors_on(tmp_path):
    """One run of two, since each takes a second to start: a source of one's own, which they call
    anew, an image to be skipped, float32 in evaluation alone, and at last an error of theirs."""
    (tmp_path / "own.py").write_text(OWN)
    for i in range(N):
        (tmp_path / f"{i:02d}.png").write_bytes(saved(source().images[i], "PNG"))
    (tmp_path / "04.png").write_bytes(b"no image")
    own = open_source(f"python:{tmp_path / 'own.py'}:own", "train")
    read = reader(of=own, preprocess=FLOAT, on_corrupt="skip")
    expected = batches(read)
    assert sum(batch["corrupt"].sum() for batch in expected) == 1
    with train_batches(read, BATCH, start_step=0, stop_step=10**6, workers=2) as iterator:
        assert_same(list(itertools.islice(iterator, STEPS)), expected)
        assert len(multiprocessing.active_children()) == 2
        for path in tmp_path.glob("*.png"):
            path.write_bytes(b"no image")
        with pytest.raises(UserError, match="100 images in a row cannot be read, up to photo"):
            list(iterator)
    assert not multiprocessing.active_children()  # closing ends them


def test_every_epoch_visits_every_example_once_in_its_own_order_and_augments_anew():
    index, images = stream(usual()), stream(usual(), "image")
    epochs = index[: 3 * N].reshape(3, N)
    assert (np.sort(epochs) == np.arange(N)).all()
    assert (epochs != np.arange(N)).any(axis=1).all()
    for one, other in itertools.combinations(epochs, 2):
        assert (one != other).any()
    for example in range(N):
        visits = images[index == example]
        assert len(visits) >= 3
        for one, other in itertools.combinations(visits, 2):
            assert (one != other).any()
    index = stream(batches(size=25, stop=2))  # a batch may be larger than the source
    np.testing.assert_array_equal(np.bincount(index[: 4 * N]), [4] * N)


def test_copies_of_an_image_come_in_one_batch_and_are_augmented_apart():
    """Each image three times, not beside itself, a third of the stream without repeats."""
    size, repeats, steps = 12, 3, 11  # four epochs of the images
    found = batches(reader(repeats=repeats), size=size, stop=steps)
    for step, batch in enumerate(found):
        copies = batch["index"].reshape(repeats, size // repeats)
        assert (copies == copies[0]).all()
        if step in (0, 1):  # within an epoch
            assert len(set(copies[0].tolist())) == 4
            assert (batch["index"] != np.roll(batch["index"], 1)).all()  # its partner in mixup
        images = batch["image"].reshape(repeats, 4, -1)
        for one, other in itertools.combinations(images, 2):
            assert (one != other).any(axis=1).all()
    firsts = np.concatenate([batch["index"][:4] for batch in found])
    np.testing.assert_array_equal(firsts[: STEPS * BATCH], stream(usual()))
    assert (np.bincount(firsts[: 4 * N]) == 4).all()
    assert_same(batches(reader(repeats=repeats), size=size, start=7, stop=steps), found[7:])
    for rows in (slice(0, 3), np.array([1, 6, 11])):  # of one host
        own = batches(reader(repeats=repeats), size=size, stop=2, rows=rows)
        expected = [{key: x[rows] for key, x in batch.items()} for batch in found[:2]]
        assert_same(own, expected)


def test_another_seed_is_another_order_and_another_augmentation():
    assert (stream(usual()) != stream(batches(reader(seed=4)))).any()
    one, other = (reader(seed=seed)(np.arange(N), np.arange(N))["image"] for seed in (3, 4))
    assert (one != other).any(axis=(1, 2, 3)).all()


@dataclasses.dataclass(frozen=True)
class FirstDraw(RandomAffine):
    """Paints an image with the first number that its generator draws."""

    def __call__(self, image, random):
        return np.full_like(image, random.integers(256))


def test_the_generator_of_an_example_is_seeded_by_seed_and_position():
    for start in (0, 5):
        found = batches(reader(affine=FirstDraw(), flip=False), start=start, stop=start + 2)
        for step, batch in enumerate(found, start):
            for row, image in enumerate(batch["image"]):
                generator = np.random.default_rng((3, step * BATCH + row))
                assert (image == generator.integers(256)).all()


@pytest.mark.parametrize("size, hosts", [(1, 1), (2, 2), (7, 1), (N, 1), (N + 1, 2), (N + 5, 1)])
def test_evaluation_reads_every_example_once_and_pads_with_black(size, hosts):
    parts = []
    for i in range(hosts):
        part = slice(i * size // hosts, (i + 1) * size // hosts)
        with eval_batches(reader(affine=None, flip=False), size, rows=part) as iterator:
            parts.append(list(iterator))
    assert {len(found) for found in parts} == {-(-N // size)}
    found = [batch for step in zip(*parts, strict=True) for batch in step]
    assert {len(batch["index"]) for batch in found} == {size // hosts}

    index, mask = stream(found), stream(found, "mask")
    assert index.tolist() == [*range(N), *[-1] * (-N % size)]
    np.testing.assert_array_equal(mask, np.arange(len(index)) < N)
    images, labels = stream(found, "image"), stream(found, "label")
    np.testing.assert_array_equal(images[:N], source().images)
    np.testing.assert_array_equal(labels[:N], source().labels)
    assert not images[N:].any()


def test_images_are_brought_to_the_size_and_channels_of_the_model():
    read = BatchReader(source(), Preprocess((3, 4), in_channels=3, resize="area"))
    found = read(np.array([0, 1]), np.array([9, -1]))
    means = source().images[9, :, :, 0].reshape(3, 2, 4, 2).mean(axis=(1, 3))
    assert np.abs(found["image"][0].astype(float) - means[..., None]).max() <= 0.5
    assert found["image"].shape == (2, 3, 4, 3)
    assert found["mask"].tolist() == [True, False]


def test_float32_pixels_are_for_evaluation_where_the_model_resizes_in_it():
    with eval_batches(BatchReader(source(), FLOAT), 7) as iterator:
        images = stream(list(iterator), "image")
    assert images.dtype == np.float32 and images.shape == (14, 4, 5, 1)
    for image, original in zip(images, source().images, strict=False):
        np.testing.assert_array_equal(FLOAT.normalise(image), FLOAT(original))
    assert not images[N:].any()
    found = batches(reader(preprocess=FLOAT), stop=2)
    assert {batch["image"].dtype for batch in found} == {np.dtype(np.uint8)}
    rounded = dataclasses.replace(FLOAT, resize_dtype="uint8")
    assert_same(found, batches(reader(preprocess=rounded), stop=2))


def test_a_split_resizes_by_its_own_rule_or_the_model_s():
    base = dataclasses.replace(FLOAT, resize="area")
    assert Split("digits", "val").preprocess(base) == base
    changed = Split("digits", "val", resize="bicubic_antialias").preprocess(base, (4, 6))
    assert changed == dataclasses.replace(base, resize="bicubic_antialias", image_size=(4, 6))
    changed = Split("digits", "val", aspect="squash", crop=0.5).preprocess(base)
    assert changed == dataclasses.replace(base, aspect="squash", crop=0.5)
    with pytest.raises(UserError, match=r"data crop is 0\.0"):
        Split("digits", "val", crop=0.0).preprocess(base)


def test_settings_that_cannot_be_are_refused():
    def data(val=None, **fields):
        DataConfig(Split("digits", "train"), Split("digits", "val", **val or {}), **fields)

    never = dict(inception_crop=InceptionCrop(), random_crop=True, affine=RandomAffine(9.0))
    never |= dict(flip=True, rand_augment=RandAugment(1, 9), erasing=0.1)
    for key, value in never.items():
        with pytest.raises(UserError, match=f"data.val is evaluated as it is: {key}"):
            data({key: value})
    cases = [
        (dict(workers=-1), "data.workers is -1 and data.threads None"),
        (dict(threads=0), "data.workers is 0 and data.threads 0"),
        (dict(on_corrupt="skp"), r"on_corrupt is 'skp'; did you mean 'skip'\?"),
    ]
    refused(lambda fields: data(**fields), cases)
    with pytest.raises(UserError, match="exclude each other"):
        Split("digits", "train", inception_crop=InceptionCrop(), random_crop=True)


READING = """
import multiprocessing, time
import numpy as np
from vit_jax.data.pipeline import BatchReader, train_batches
from vit_jax.data.forms.arrays import ArraySource
from vit_jax.data.transforms import Preprocess

if __name__ == "__main__":
    source = ArraySource(np.zeros((5, 4, 4, 1), np.uint8), np.zeros(5, np.int32), ("a",))
    read = BatchReader(source, Preprocess((4, 4), 1))
    with train_batches(read, 2, start_step=0, stop_step=10**9, workers=1) as batches:
        next(batches)
        print(multiprocessing.active_children()[0].pid, flush=True)
        time.sleep(600)
"""


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # nobody may be there to collect an orphan that has ended


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_worker_process_ends_with_a_parent_that_is_killed(tmp_path):
    path, worker = tmp_path / "script.py", None
    path.write_text(READING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 15
        while alive(worker) and time.monotonic() < end:
            time.sleep(0.1)
        assert not alive(worker)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        if worker and alive(worker):
            os.kill(worker, signal.SIGKILL)


def test_a_worker_whose_parent_did_not_live_until_it_had_started_ends(monkeypatch):
    """It takes seconds to start; whoever adopted it by then is not its parent."""
    ended, ignored = threading.Event(), {}
    monkeypatch.setattr(ahead.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(ahead.signal, "signal", ignored.__setitem__)
    ahead.end_with(os.getppid() + 1, 0, 1)
    assert ended.wait(60)
    assert ignored == dict.fromkeys((signal.SIGTERM, signal.SIGINT), signal.SIG_IGN)


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
    cases = [
        ("train.repeats=0", r"data\.train\.repeats is 0; it must be at least 1"),
        ("train.repeats=3", r"repeats is 3, which does not divide batch_size 64: .* such as 63"),
        ("val.repeats=2", r"data\.val is evaluated as it is: repeats"),
        ("val.rand_augment.layers=1", r"data\.val is evaluated as it is: rand_augment"),
        ("train.erasing=2.0", r"probability is 2\.0"),
    ]
    refused(lambda flag: load_config(DIGITS, [f"--config.data.{flag}"]), cases)
