"""The command line: results on stdout, mistakes as one sentence and exit code 2."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import DIGITS, ROOT, TINY, fails, write_config

from vit_jax.__main__ import main
from vit_jax.checkpoints.store import lock
from vit_jax.data.sources import open_source
from vit_jax.models.config import ViTConfig
from vit_jax.training.config_file import load_config
from vit_jax.training.model import model_config

MISTAKES = {
    "misspelt key": (["--config.optim.learning_rat=1"], r"unknown config key .*optim"),
    "misspelt leaf": (["--config.optim.warmpu=1"], "did you mean 'optim.warmup'"),
    "unknown section": (["--config.optimizer.lr=1"], "unknown config key"),
    "unknown model field": (["--config.model.widht=8"], "did you mean 'model.width'"),
    "wrong type": (["--config.batch_size=many"], "batch_size"),
    "batch and devices": (["--config.batch_size=12"], "does not divide among 8 devices"),
    "batch and micro-batches": (["--config.optim.accumulate=3"], "times 3 micro-batches"),
    "image and patch": (["--config.model.image_size=9"], "9x9 pixels does not divide .* 2x2"),
    "unknown variant": (["--config.model.variant=XL/2"], "no variant 'XL'"),
    "no variant": (["--config.model.variant=B"], "expected VARIANT/PATCH"),
    "missing init_from": (["--config.init_from=/nowhere"], "there is no '/nowhere'"),
    "unknown source": (["--config.data.train.source=digit"], "did you mean 'digits'"),
    "unknown split": (["--config.data.train.split=trian"], "did you mean 'train'"),
    "unknown objective": (["--config.objective=softmaks"], "did you mean 'softmax'"),
    "unknown optimiser": (["--config.optim.name=adamv"], "did you mean 'adam"),
    "unknown precision": (["--config.precision=bf16"], "bfloat16"),
    "mesh": (["--config.mesh.data=3"], "does not fit 8 devices"),
    "warm-up": (["--config.optim.warmup=999"], "longer than the run"),
    "negative seed": (["--config.seed=-1"], "seed is -1"),
    "minutes": (["--config.checkpoint.every_minutes=nan"], r"checkpoint\.every_minutes is nan"),
    "evaluation batch": (["--config.eval.batch_size=-3"], r"eval\.batch_size is -3"),
    "infinite rate": (["--config.optim.lr=inf"], r"optim\.lr is inf"),
    "augmented evaluation": (["--config.data.val.flip=True"], r"data\.val is evaluated as it is"),
    "two durations": (
        ["--config.total_steps=1", "--config.total_epochs=1"],
        "exactly one of .* found total_steps and total_epochs",
    ),
    "classes": (["--config.model.num_classes=7"], "num_classes is 7"),
    "resize": (["--config.data.train.resize=cubic"], "resize 'cubic'"),
    "position resize": (["--config.model.position_resize=zoo"], "did you mean 'zoom'"),
    "no override": (["--batch_size=3"], "unknown argument '--batch_size=3'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, capsys, tmp_path):
    overrides, message = MISTAKES[name]
    pathlib.Path(tmp_path, "keep.log").write_text("mine")
    err = fails(capsys, "train", f"--config={DIGITS}", f"--workdir={tmp_path}", *TINY, *overrides)
    assert pytest.RaisesExc(ValueError, match=message).matches(ValueError(err)), err
    assert {p.name for p in tmp_path.iterdir()} <= {"keep.log", ".lock"}


def test_mistakes_about_the_config_file(capsys, tmp_path):
    workdir = f"--workdir={tmp_path}"
    err = fails(capsys, "train", "--config=configs/digit.py", workdir)
    assert "there is no config file 'configs/digit.py'" in err
    err = fails(capsys, "train", f"--config={DIGITS}:finetun", workdir)
    assert "argument 'finetun'" in err
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    assert "no function get_config" in fails(capsys, "train", f"--config={empty}", workdir)
    stored = tmp_path / "config.json"
    stored.write_text("{}")
    assert "expected FILE.py" in fails(capsys, "train", f"--config={stored}", workdir)
    nothing = tmp_path / "nothing.py"
    nothing.write_text("def get_config():\n    return None\n")
    assert "returns no ConfigDict" in fails(capsys, "train", f"--config={nothing}", workdir)
    assert "get_config" in fails(capsys, "train", f"--config={nothing}:arg", workdir)
    err = fails(capsys, "train", f"--config={DIGITS}", f"--workdir={nothing}", *TINY)
    assert "is a file" in err
    unknown = write_config(tmp_path / "unknown.py", "batchsize=3")
    err = fails(capsys, "train", f"--config={unknown}", workdir)
    assert "unknown config key batchsize; did you mean 'batch_size'" in err


def test_recipes_are_found_by_name_from_any_folder(capsys, caplog, tmp_path, monkeypatch):
    caplog.set_level("INFO", "vit_jax")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "digits.py", "plain"):
        (tmp_path / name).write_text("x = 1\n")
    assert load_config("digits:finetune").optim.lr == 5e-4
    assert "for digits.py in this folder write --config=digits.py" in caplog.text
    assert load_config("images:S/16,folder:x,all[:90%],all[90%:]").data.val.split == "all[90%:]"
    for spec, message in (
        ("finetun", "there is no recipe 'finetun'; did you mean 'finetune'? (`vit-jax configs`"),
        ("presets", "there is no recipe 'presets'"),
        ("mine", "for the file write --config=mine.py"),
        ("configs/bit.py:R50x1,[a]", "recipe of this name write '--config=bit:R50x1,[a]'"),
        ("configs/bit", "'configs/bit' is no config file"),
        ("digits.py", "no function get_config"),
    ):
        assert message in fails(capsys, "preflight", f"--config={spec}"), spec

    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert "finetune:VARIANT,DATA[,dev][,SIZE][,EVALUATOR...][,SOURCE]" in out
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert {line.partition(":")[0] for line in out.split("\n\n")[0].splitlines()[::2]} == (
        files - {"presets"}
    )


def test_another_config_does_not_resume(capsys, tiny_run):
    workdir, _ = tiny_run
    before = (workdir / "config.json").read_text()
    train = ["train", f"--config={DIGITS}", f"--workdir={workdir}", *TINY]
    err = fails(capsys, *train, "--config.optim.lr=0.5", "--config.seed=3")
    assert "optim.lr: 0.003 -> 0.5" in err and "seed: 0 -> 3" in err
    assert (workdir / "config.json").read_text() == before
    # What decides nothing about the result may differ.
    lines = (workdir / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert main([*train, "--json", "--config.log.every=7", "--config.data.threads=1"]) == 0
    # It has finished, and is left alone.
    assert (workdir / "metrics.jsonl").read_text() == lines
    assert json.loads(capsys.readouterr().out)["test/accuracy"] == tiny_run[1]["test/accuracy"]


def test_a_workdir_is_one_runs_at_a_time(capsys, tiny_run):
    workdir, _ = tiny_run
    with lock(workdir):
        err = fails(capsys, "train", f"--config={DIGITS}", f"--workdir={workdir}", *TINY)
    assert "is in use by process" in err


def test_a_changed_data_set_does_not_resume(capsys, tiny_run, tmp_path):
    images = np.arange(64 * 8 * 8, dtype=np.uint8).reshape(64, 8, 8)
    found = []
    for flipped in (0, 0, 1):
        images[3, 2, 1] ^= flipped
        np.savez(tmp_path / "data.npz", train_images=images, train_labels=np.arange(64) % 4)
        found.append(open_source(f"arrays:{tmp_path / 'data.npz'}", "train").fingerprint)
    assert found[0] == found[1] != found[2]

    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    card = json.loads((run / "model" / "model.json").read_text())
    assert card["fingerprint"] == open_source("digits", "train").fingerprint
    (run / "model" / "model.json").write_text(json.dumps({**card, "fingerprint": found[0]}))
    err = fails(capsys, "train", f"--config={DIGITS}", f"--workdir={run}", *TINY)
    assert "the data of digits changed since" in err


def test_evaluate_prints_what_training_printed(capsys, tiny_run):
    workdir, result = tiny_run
    assert main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["test/accuracy"] == result["test/accuracy"]
    assert printed["val/loss"] == pytest.approx(result["val/loss"], rel=1e-6)
    argv = ["evaluate", f"--model={workdir}", f"--config={DIGITS}", "--config.batch_size=16"]
    argv.append("--json")
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["test/accuracy"] == result["test/accuracy"]

    assert "give --workdir" in fails(capsys, "evaluate")
    assert "no run folder" in fails(capsys, "evaluate", "--workdir=/nowhere")


def test_predict_names_the_classes_of_png_files(capsys, tiny_run, tmp_path):
    source = open_source("digits", "test")
    files = []
    for index in range(3):
        files.append(str(tmp_path / f"a digit {index} é.png"))
        PIL.Image.fromarray(source.images[index, ..., 0]).save(files[-1])
    assert main(["predict", f"--model={tiny_run[0]}", "--topk=3", *files]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files
    import vit_jax

    vit = vit_jax.load(tiny_run[0])
    model = jax.jit(vit.model)
    for line, image in zip(lines, source.images, strict=False):
        logits = np.asarray(model(vit.preprocess(image)[None])[0], np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-probabilities)[:3]
        assert [name for name, _ in line["labels"]] == [str(i) for i in best]
        assert [p for _, p in line["labels"]] == pytest.approx(probabilities[best], rel=1e-4)

    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    predict = ["predict", f"--model={tiny_run[0]}"]
    assert main([*predict, str(notes)]) == 3
    assert json.loads(capsys.readouterr().out) == {
        "file": str(notes),
        "error": "it is of no known format",
    }
    assert "there is no '" in fails(capsys, *predict, tmp_path / "none.png")
    assert "there is no '/nowhere'" in fails(capsys, "predict", "--model=/nowhere", files[0])
    assert "holds no weights" in fails(capsys, "predict", f"--model={tmp_path}", files[0])


def test_flags_reach_every_key_and_none_takes_back():
    flags = ["--config.optim.grad_clip=None", "--config.model.representation_size=None"]
    flags += ["--config.optim.ema=0.9", "--config.model.image_size=12", "--config.total_steps=5"]
    config = load_config(DIGITS, flags)
    assert config.optim.grad_clip is None and config.optim.ema == 0.9
    assert model_config(config, None, 10).representation_size is None
    assert model_config(config, None, 10).image_size == (12, 12)
    assert (config.total_steps, config.total_epochs) == (5, None)
    assert load_config(DIGITS).optim.grad_clip == 1.0
    for field, value in (("scan", False), ("class_token", False), ("layer_scale", 0.5)):
        config = load_config(DIGITS, [f"--config.model.{field}={value}", "--config.model.pool=gap"])
        assert getattr(model_config(config, None, 10), field) == value


def test_a_variant_beside_init_from_changes_its_sizes_alone(tiny_run, tmp_path, capsys):
    base = ViTConfig(
        width=32, num_heads=2, gelu="erf", layernorm_eps=1e-12, in_channels=1, num_classes=10
    )
    config = load_config(f"{DIGITS}:finetune", ["--config.model.variant=mu/2"])
    vit = model_config(config, base, 10)
    assert (vit.gelu, vit.layernorm_eps, vit.in_channels) == ("erf", 1e-12, 1)
    assert (vit.patch_size, vit.depth) == ((2, 2), 1)
    flags = [f"--config.init_from={tiny_run[0]}", "--config.model.variant=mu/2"]
    said = fails(capsys, "train", f"--config={DIGITS}:finetune", f"--workdir={tmp_path}/r", *flags)
    assert "width 32, depth 1, mlp_dim 128, but the checkpoint of init_from has width 16" in said
    assert "--config.model.variant=None takes the checkpoint's sizes" in said


@pytest.fixture
def photos(tmp_path):
    """A folder of JPEGs of three sizes and three classes, one of them bright in each channel."""
    random = np.random.default_rng(0)
    for split, count in {"train": 24, "val": 6}.items():
        for channel, name in enumerate(["red fox", "grüner Baum", "blue"]):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                image = random.integers(0, 90, (30 + i % 3, 40, 3), np.uint8)
                image[..., channel] += 150
                path = tmp_path / "photos" / split / name / f"{i}.jpg"
                PIL.Image.fromarray(image).save(path)
    return tmp_path / "photos"


IMAGES = f"{ROOT / 'configs' / 'images.py'}:mu/8"
SMALL = ["--config.model.image_size=16", "--config.batch_size=24", "--config.optim.lr=3e-3"]


def test_from_a_folder_of_jpegs_to_a_prediction(photos, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [f"--config={IMAGES},folder:{photos}", f"--workdir={run}", *SMALL]
    (photos / "train" / "blue" / "0.jpg").write_bytes(b"no image")

    err = fails(capsys, "train", *flags, "--config.total_steps=20")
    assert "photos/train/blue/0.jpg is no readable image" in err
    skip = ["--json", "--config.total_steps=20", "--config.data.on_corrupt=skip"]
    assert main(["train", *flags[:1], f"--workdir={tmp_path / 'skip'}", *flags[2:], *skip]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["val/accuracy"] == 1.0 and results["val/corrupt"] == 0
    lines = (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()
    assert "train/corrupt" in json.loads(lines[0])

    files = [str(photos / "val" / name / "5.jpg") for name in ("grüner Baum", "red fox")]
    assert main(["predict", f"--model={tmp_path / 'skip'}", "--topk=1", *files]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["labels"][0][0] for line in lines] == ["grüner Baum", "red fox"]
    record = json.loads((tmp_path / "skip" / "model" / "model.json").read_text())
    assert record["preprocess"]["exif"] is True  # what people photograph is turned upright

    (photos / "train" / "blue" / "new.jpg").write_bytes((photos / "val/blue/0.jpg").read_bytes())
    err = fails(capsys, "train", *flags[:1], f"--workdir={tmp_path / 'skip'}", *flags[2:], *skip)
    assert "the data of folder:" in err and "changed since" in err


def test_what_prepare_wrote_trains_like_the_folder(photos, tmp_path, capsys):
    for split in ("train", "val"):
        shards = str(tmp_path / "shards")
        assert (
            main(["prepare", str(photos), shards, f"--split={split}", "--shard-examples=20"]) == 0
        )
        told = json.loads(capsys.readouterr().out)
        assert told["classes"] == 3 and told["bad_images"] == 0
    results = []
    for source in (f"folder:{photos}", told["source"]):
        run = tmp_path / source.partition(":")[0]
        flags = [f"--config={IMAGES},{source}", f"--workdir={run}", *SMALL]
        assert main(["train", *flags, "--json", "--config.total_steps=20"]) == 0  # one program
        results.append(json.loads(capsys.readouterr().out))
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert results[0][name] == results[1][name]


def test_an_endless_source_has_no_epochs(tmp_path, capsys):
    source = "fractals:classes=3,size=16"
    flags = [f"--config={IMAGES},{source}", f"--workdir={tmp_path}", *SMALL]
    assert "is endless, so that there are no epochs" in fails(capsys, "train", *flags)
    flags.append("--config.data.val.split=train")
    err = fails(capsys, "train", *flags, "--config.total_steps=2")
    assert "data.val.source fractals:classes=3,size=16 is endless" in err


def test_ctrl_c_ends_the_program_at_once():
    """No KeyboardInterrupt, which an import or a callback may swallow."""
    code = (
        "import os, signal; from vit_jax import __main__ as program\n"
        "program.main = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "program.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")
