"""The pages of docs/ do what they say: each is run from its first command to its last.

A page runs in an empty folder, with the repository's configs and what `things` makes in place of
what its reader has. Its commands are run as they stand, but smaller, see `smaller`; the steps of
training, and those that measure on the way, are traced alone. Fences that a mark says cannot be run
here are parsed, and their configs loaded.
"""

import pathlib
import platform
import re
import shlex
import subprocess

import jax
import matplotlib
import numpy as np
import PIL.Image
import pytest
import servers
from conftest import ROOT
from pages import DOCS, check_command, commands, fences, joined

import vit_jax
from vit_jax.__main__ import main
from vit_jax.analysis import plots, preflight
from vit_jax.training import loop
from vit_jax.training.evaluation.evaluation import Evaluation

matplotlib.use("Agg")
# A page of the reference is looked up, not followed.
PAGES = {path.stem: path for path in DOCS if path.parent.name in ("tutorials", "how-to")}
DURATION = re.compile(r"--config\.total_(steps|epochs|examples)=")
# What a command that trains ends with; the page's own duration is left out.
SHORT = ["--config.total_steps=2"]
# Of a photograph 32 pixels are kept, and S/16 is mu/16: one layer, width 32.
SMALL = ["--config.model.image_size=32", "--config.batch_size=8"]
WRITE_CURVES = plots.write_curves


def smaller(argv):
    """A page's command so that it takes seconds."""
    if argv[0] not in ("train", "preflight"):
        return argv
    argv = [arg for arg in argv if not DURATION.match(arg)] + SHORT
    argv = [re.sub(r"(probe\.steps)=\d+", r"\1=1", arg) for arg in argv]
    own = ("--config=images:", "--config=configs/images.py", "--config=finetune_own:")
    if any(arg.startswith(own) for arg in argv):
        argv = [arg.replace("S/16,", "mu/16,") for arg in argv] + SMALL
    return argv


@pytest.fixture(scope="module")
def things(tmp_path_factory, tiny_run):
    """Pictures in folders, published weights, and what `make train` leaves."""
    folder = tmp_path_factory.mktemp("things")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for channel, name in enumerate(["cat", "dog", "rabbit"]):
            (folder / "pets" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = random.integers(0, 90, (20 + i, 24, 3), np.uint8)
                pixels[..., channel] += 150
                PIL.Image.fromarray(pixels).save(folder / "pets" / split / name / f"{i}.jpg")
    published = vit_jax.create("mu/16", image_size=32, num_classes=21)
    vit_jax.save(published, folder / "S_16.npz", format="google")
    (folder / "runs").mkdir()
    for name in ("digits_seed0", "digits_seed0_16x16"):
        (folder / "runs" / name).symlink_to(tiny_run[0])
    for name in ("configs", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    return folder


class TracedEvaluation(Evaluation):
    """What learned nothing is measured in name only: the step is traced for the first batch."""

    def classify(self, params, name, split):
        if self._config.segments or self._config.detects:  # of small images
            return super().classify(params, name, split)
        with self._batches(self._reads[name, split]) as batches:
            batch = self._to_devices(next(iter(batches)))
        sums = jax.eval_shape(self._eval_step, params, batch, 0)
        return dict.fromkeys(sums.keys() - {"count"}, 0.5)


@pytest.fixture
def here(things, tmp_path, monkeypatch, untrained):
    """An empty folder with those, as the current one."""
    (tmp_path / "runs").mkdir()
    for thing in [*things.iterdir(), *(things / "runs").iterdir()]:
        if thing.name != "runs":
            (tmp_path / thing.relative_to(things)).symlink_to(thing.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "_SECONDS_OF_DATA", 0.1)
    monkeypatch.setattr(loop, "Evaluation", TracedEvaluation)
    monkeypatch.setattr(plots, "write_curves", lambda workdir: None)  # but where a page shows them
    return tmp_path


@pytest.fixture
def cloud(monkeypatch):
    """A store with the bucket of a page; its server's wheel has a program for x86 alone."""
    if platform.machine() != "x86_64":
        pytest.skip("no server of Google's protocol for this machine")
    with servers.google(bucket="my-bucket") as found:
        for name, value in found.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("VIT_JAX_CACHE", "cache")
        yield


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_from_its_first_command_to_its_last(name, here, monkeypatch, request):
    if name == "pretrain":
        monkeypatch.setattr(plots, "write_curves", WRITE_CURVES)
    if name == "buckets":
        request.getfixturevalue("cloud")
    names = {"__name__": "__main__"}
    for fence in fences(PAGES[name].read_text()):
        where = f"{name}.md: {fence.text[:60]}"
        if fence.needs or fence.language not in ("bash", "python"):
            assert fence.needs or not commands(fence.text), f"{where} is no ```bash"
            if fence.language == "python":
                compile(fence.text, where, "exec")
            for argv in commands(fence.text):
                check_command(argv)
        elif fence.language == "python":
            exec(compile(fence.text, where, "exec"), names)
        else:
            for line in joined(fence.text).splitlines():
                if line.startswith(("vit-jax ", "python -m vit_jax ")):
                    (argv,) = commands(line)
                    check_command(argv)
                    assert main(smaller(argv)) == 0, line
                else:
                    subprocess.run(["bash", "-ec", line], check=True)
    import matplotlib.pyplot as plt

    plt.close("all")
    for made in MADE.get(name, ()):
        assert pathlib.Path(made).exists(), made


# What there is afterwards, of what a page says that there will be.
MADE = {
    "fine_tune": ["shards/pets/vit_jax_train.json", "runs/pets/checkpoints/best.json", "pets.csv"],
    "pretrain": ["runs/digits/curves.png", "runs/digits_16/metrics.jsonl"],
    "look_inside": ["pictures/positions.png", "pictures/attention_digit.png"],
    "segment": [
        "runs/shapes/pictures.png",
        "pictures/val_model.png",
        "masks/19.png",
        "masks/19.overlay.png",
    ],
    "detect": [
        "runs/shapes/pictures.png",
        "pictures/val_model.png",
        "boxes/boxes.json",
        "boxes/19.overlay.png",
    ],
    "checkpoints": ["digits.npz", "digits.json"],
}


def test_most_of_each_page_is_run_or_says_what_it_needs():
    marked, run = {}, {}
    for name, page in PAGES.items():
        for fence in fences(page.read_text()):
            if fence.language in ("bash", "python"):
                (marked if fence.needs else run).setdefault(name, []).append(fence)
    assert set(run) == set(PAGES) - {"tpu_pod", "several_hosts", "speed"}
    assert {fence.needs.split(",")[0] for each in marked.values() for fence in each} == {
        *("a network", "a cloud", "a cluster", "ImageNet", "the TPU's compiler"),
        *("XLA's compiler for GPUs", "seconds", "minutes", "make train", "two terminals"),
        *("a file of two models", "jax2onnx", "the extra hub"),
    }


def test_published_weights_are_where_a_page_says():
    known = {each.path for each in vit_jax.published()}
    store = "https://storage.googleapis.com/"
    named = [
        url for page in DOCS for url in re.findall(rf"{store}[^\s)]+", joined(page.read_text()))
    ]
    assert named
    for url in named:
        assert url.replace(store, "gs://") in known


def test_a_command_is_found_behind_others_and_across_lines():
    text = 'srun -n 2 python -m vit_jax train --config=a.py \\\n    --workdir=b  # why\nx="'
    assert commands(text) == [["train", "--config=a.py", "--workdir=b"]]
    text = 'ssh --command="cd x && python -m vit_jax inspect y; true"'
    assert commands(text) == [["inspect", "y"]]
    text = "<!-- needs: a cloud -->\n```bash\na\n```\n\n```\nb\n```\n"
    assert [(f.language, f.text, f.needs) for f in fences(text)] == [
        ("bash", "a", "a cloud"),
        ("", "b", ""),
    ]
    argv = shlex.split("train --config=configs/images.py:S/16,folder:x --config.total_epochs=3")
    assert "--config=configs/images.py:mu/16,folder:x" in smaller(argv)
    assert not any("epochs" in arg for arg in smaller(argv))
