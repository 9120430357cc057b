"""What a mistake at the command line is answered with: our word for theirs, and one sentence."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import DIGITS, ROOT, fails, write_config
from etils import epath
from flax import nnx

import vit_jax
from vit_jax import extras, words
from vit_jax.__main__ import COMMANDS, main
from vit_jax.checkpoints.card import OBJECTIVES
from vit_jax.checkpoints.export import FORMATS
from vit_jax.checkpoints.opened import open_model
from vit_jax.data.sources import SOURCES
from vit_jax.data.transforms import _CV2, _PILLOW
from vit_jax.errors import UserError, name_extra, nearest, sentence
from vit_jax.extras import install
from vit_jax.flags import make_parser
from vit_jax.launch.launchers import LAUNCHERS
from vit_jax.models.config import CHOICES
from vit_jax.models.create import structure
from vit_jax.models.posembed import RESIZE_METHODS
from vit_jax.models.variants import variant
from vit_jax.training import optim
from vit_jax.training.config import Config, differences, keys, unpack
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.predict_output import as_json
from vit_jax.training.model import model_config
from vit_jax.training.plan import count_steps
from vit_jax.writing import write_atomically


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file of weights of a model of one block."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    graphdef, shapes = structure(variant("mu/4", image_size=8, num_classes=2))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    vit_jax.save(nnx.merge(graphdef, zeros), path)
    return path


# Names. ------------------------------------------------------------------------------------------

MEANT = {
    "optim.learning_rate": "optim.lr",
    "LR": "optim.lr",
    "optim.learning_rat": "optim.lr",
    "optimizer.lr": "optim.lr",
    "optim_lr": "optim.lr",
    "bs": "batch_size",
    "batchsize": "batch_size",
    "batch-size": "batch_size",
    "epochs": "total_epochs",
    "max_steps": "total_steps",
    "img_size": "model.image_size",
    "model.resolution": "model.image_size",
    "model.heads": "model.num_heads",
    "arch": "model.variant",
    "wd": "optim.weight_decay",
    "warmup_epochs": "optim.warmup",
    "max_grad_norm": "optim.grad_clip",
    "grad_accum": "optim.accumulate",
    "ema_decay": "optim.ema",
    "optimizer": "optim.name",
    "pretrained": "init_from",
    "resume": "init_from --workdir",
    "dataset": "data.train.source data.val.source",
    "data.val.path": "data.val.source",
    "data.trian.source": "data.train.source",
    "num_workers": "data.workers",
    "bf16": "precision",
    "gpus": "mesh.data",
    "smoothing": "augment.label_smoothing",
    "save_every": "checkpoint.every",
    "print_freq": "log.every",
    "eval_interval": "eval.every",
    "output_dir": "--workdir",
    "workdir": "--workdir",
}


def test_a_key_is_known_by_the_names_that_others_give_it():
    for name, meant in MEANT.items():
        unknown = f"unknown config key in --config.{name}=1; did"
        with pytest.raises(UserError, match=unknown) as error:
            load_config(DIGITS, [f"--config.{name}=1"])
        wanted = " or ".join(map(repr, meant.split()))
        assert str(error.value).endswith(f"did you mean {wanted}?")


def test_what_is_like_no_key_is_answered_with_those_of_its_section():
    with pytest.raises(UserError, match=r"known: mesh.data, mesh.determ\w+, mesh.fsdp, mesh.ten"):
        load_config(DIGITS, ["--config.mesh.qqq=1"])
    with pytest.raises(UserError, match=r"known: augment.\*, batch_size, .*, total_steps$"):
        load_config(DIGITS, ["--config.qqq=1"])


def test_a_config_files_own_words():
    section = {"source": "digits", "split": "train"}
    for values, message in (
        (
            {"batch_size": 8, "optim": {"learning_rate": 1.0}},
            r"key optim.learning_rate; .*'optim.lr'",
        ),
        ({"batch_size": 8, "lr": 1.0}, "did you mean 'optim.lr'"),
        ({"batch_size": 8, "optimizer": {"lr": 1.0}}, r"did you mean 'optim'\?"),
        ({"batch_size": 8, "data": {"train": section, "workerz": 1}}, "'data.workers'"),
    ):
        with pytest.raises(UserError, match=message):
            unpack(Config, values)


def test_values_are_known_by_other_names_too():
    for value, known, wanted in (
        ("adamW", optim.NAMES, "adamw"),
        ("AdamW", optim.NAMES, "adamw"),
        ("bf16", CHOICES["dtype"], "bfloat16"),
        ("fp32", CHOICES["dtype"], "float32"),
        ("float16", CHOICES["dtype"], "bfloat16"),
        ("bce", OBJECTIVES, "sigmoid"),
        ("cross_entropy", OBJECTIVES, "softmax"),
        ("step", optim.SCHEDULES, "staircase"),
        ("bicubic", (*_CV2, *_PILLOW), "bicubic_antialias"),
        ("cls", CHOICES["pool"], "token"),
        ("imagefolder", SOURCES, "folder"),
        ("huggingface", FORMATS, "hf"),
        ("digit", SOURCES, "digits"),
    ):
        assert nearest(value, known) == f"did you mean {wanted!r}?"
    assert nearest("", ("a", "b")) == nearest("zz", ("b", "a")) == "known: a, b"


def test_every_word_leads_to_something_that_exists():
    parser = make_parser(COMMANDS)
    (commands,) = (a.choices for a in parser._actions if a.choices)
    flags = {flag for each in commands.values() for flag in each._option_string_actions}
    values = {*optim.NAMES, *optim.SCHEDULES, *OBJECTIVES, *FORMATS, *SOURCES, *LAUNCHERS}
    values |= {*RESIZE_METHODS, *_CV2, *_PILLOW, "train", "val", "validation"}
    for choices in CHOICES.values():
        values |= {*choices}
    for table, known in (
        (words.KEYS, set(keys())),
        (words.FLAGS, flags),
        (words.COMMANDS, set(commands)),
        (words.VALUES, values),
    ):
        assert set(table) <= known, set(table) - known


def test_flags_and_commands_are_suggested_of_those_that_exist(capsys, model, tmp_path):
    train = ["train", f"--config={DIGITS}", f"--workdir={tmp_path}"]
    for argv, message in (
        ([*train, "--lr=1"], "unknown argument '--lr=1'; did you mean '--config.optim.lr'?"),
        ([*train, "--batch-size", "3"], "did you mean '--config.batch_size'?"),
        (["train", f"--config={DIGITS}", "--work=x"], "'--work=x'; did you mean '--workdir'?"),
        (["train", f"--config={DIGITS}", "--out=x"], "did you mean '--workdir'?"),
        ([*train, "--config.optim.lr", "3", "--config.seed"], "write --config.seed=VALUE"),
        ([*train, "--config.seed", "--config.lr=3"], "write --config.seed=VALUE"),
        ([*train, "--config.data=3"], "unknown config key in --config.data=3"),
        ([*train, "extra"], "unknown argument 'extra'"),
        (["predict", f"--model={model}", "--top_k=3", "a.png"], "did you mean '--topk'?"),
        (["predict", "--checkpoint=x", "a.png"], "did you mean '--model'?"),
        (["prepare", "a", "b", "--qqq"], "known: --classes, --examples, --help"),
        (["inspect", model, "--set", "heads=12"], "did you mean 'num_heads'?"),
        (["inspect", model, "--set", "layers=12"], "did you mean 'depth'?"),
        (["inspect", model, "--set", "gelu=erf", "--set", "gelu=tanh"], "which of them"),
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["eval"], "did you mean 'evaluate'?"),
        (["finetune"], "did you mean 'train'?"),
        (["predict"], "the following arguments are required: --model, IMAGE; see `vit-jax"),
    ):
        assert message in fails(capsys, *argv), argv


def test_help_and_version(capsys):
    for argv, code, text in (
        ([], 2, "usage: vit-jax"),
        (["help"], 0, "usage: vit-jax"),
        (["help", "predict"], 0, "--topk"),
        (["--version"], 0, f"vit_jax {vit_jax.__version__}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        told = capsys.readouterr()
        assert stopped.value.code == code and text in (told.err if code else told.out)
        assert not (told.out if code else told.err)


# Values. -----------------------------------------------------------------------------------------


def test_sides_are_read_whatever_the_file_has(tmp_path):
    for number, written in enumerate(("64", "(64, 64)", "[64, 64]", "None")):
        model = f"model=dict(variant='mu/16', image_size={written}, patch_size={written})"
        file = write_config(tmp_path / f"c{number}.py", f"batch_size=8, {model}")
        for text in ("64,96", "(64, 96)", "[64,96]", "64x96", "32"):
            flags = [f"--config.model.{name}_size={text}" for name in ("image", "patch")]
            model = model_config(load_config(file, flags), None, 2)
            size = (32, 32) if text == "32" else (64, 96)
            assert model.image_size == model.patch_size == size, (written, text)


def test_one_side_and_two_equal_ones_are_no_difference():
    flags = [f"--config.model.image_size={text}" for text in ("8", "8,8", "8x16")]
    one, same, other = (load_config(DIGITS, [flag]) for flag in flags)
    assert differences(one, same) == []
    assert differences(one, other) == ["model.image_size: [8, 8] -> [8, 16]"]


def test_the_end_of_a_key_will_do_and_a_space_for_the_equals_sign(caplog):
    caplog.set_level("INFO", "vit_jax")
    line = "train --config=x --workdir=y --config.mu_dtype bfloat16 --config.mesh.data -1"
    _, flags = make_parser(COMMANDS).parse_known_args(line.split())
    assert flags == ["--config.mu_dtype=bfloat16", "--config.mesh.data=-1"]
    flags += [
        "--config.train.flip=true",
        "--config.test.split=val",
        "--config.end_lr=1",
        "--config.optim.end_lr=2",
    ]
    config = load_config(DIGITS, flags)
    assert (config.optim.mu_dtype, config.data.test.split) == ("bfloat16", "val")
    assert config.optim.end_lr == 2.0 and config.data.train.flip
    assert "--config.mu_dtype sets optim.mu_dtype" in caplog.messages
    assert "--config.optim.end_lr=2 counts, not the 1 before it" in caplog.messages
    with pytest.raises(UserError, match=r"any of --config\.eval\.every, --config\.checkpoint\."):
        load_config(DIGITS, ["--config.every=3"])


def test_one_value_stands_for_a_tuple_of_one():
    section = {"source": "digits", "split": "train"}
    knn = {"type": "knn", "train": section, "test": section, "neighbours": 5}
    config = {"batch_size": 8, "eval": {"evaluators": {"knn": knn}}}
    assert unpack(Config, config).eval.evaluators["knn"].neighbours == (5,)
    section["affine"] = {"scale": 1.5}
    with pytest.raises(UserError, match=r"affine\.scale is 1\.5; expected 2 values"):
        unpack(Config, {"batch_size": 8, "data": {"train": section}})


def test_values_are_read_by_the_type_of_their_key():
    for key, text, value in (
        ("total_examples", "1e6", 1_000_000),
        ("batch_size", "0128", 128),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("optim.lr", "1", 1.0),
        ("data.train.flip", "true", True),
        ("data.train.flip", "0", False),
        ("data.train.affine.scale", "1,2", (1.0, 2.0)),
        ("init_from", "a=b", "a=b"),
        ("optim.grad_clip", "None", None),
        ("data.val", "None", None),
    ):
        found = load_config(DIGITS, [f"--config.{key}={text}"])
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value and type(found) is type(value), key


def test_a_key_that_is_given_again(caplog):
    caplog.set_level("INFO", "vit_jax")
    drops = [f"--config.optim.drops={text}" for text in ("(0.3,0.6)", "(0.8,)")]
    config = load_config(DIGITS, ["--config.optim.schedule=staircase", *drops])
    assert config.optim.drops == (0.8,)
    assert caplog.messages == ["--config.optim.drops=(0.8,) counts, not the (0.3,0.6) before it"]
    caplog.clear()
    assert load_config(DIGITS, ["--config.seed=3", "--config.seed=3"]).seed == 3
    assert make_parser(COMMANDS).parse_args(["report", "--out=a", "--out=b", "d"]).out == "b"
    assert caplog.messages == ["--out=b counts, not the a before it"]
    flags = ["--config.optim.lr=1", "--config.optim=None"]
    for order in (flags, flags[::-1]):
        with pytest.raises(UserError, match=r"optim=None and --config.optim.lr=1 exclude"):
            load_config(DIGITS, order)


def test_a_run_of_no_steps_says_why():
    for flags, message in (
        (
            ["batch_size=100000", "total_epochs=1"],
            "batch_size is 100000, but data.train has 237 ex",
        ),
        (["batch_size=64", "total_examples=8"], "total_examples=8 in batches of batch_size=64"),
        (["total_epochs=-1"], "total_epochs is -1.0; it must be above 0"),
        (["total_steps=0"], "total_steps is 0; it must be above 0"),
    ):
        config = load_config(DIGITS, [f"--config.{flag}" for flag in flags])
        with pytest.raises(UserError, match=message):
            count_steps(config, 237)


# One wrong value for each flag of each command; MODEL stands for a file of weights.
_FLAGS = {
    "train --config=DIGITS --workdir=TMP/r": [
        *("--config=nowhere.py", "--config=", "--processes=0", "--processes=x", "--process-id=-1"),
        *("--join-timeout=0", "--coordinator=nowhere", "--config.seed=1.5", "--config.seed="),
        *("--config.=1", "--config.optim=3", "--config.optim.drops=a", "--config.data.train=3"),
        *("--config.model.image_size=0", "--config.model.image_size=8y8", "--config.optim.lr="),
        *("--config.model.image_size=1,2,3", "--config.model.patch_size=2.5", "--config.log=1"),
        *("--config.data.train.flip=maybe", "--config.total_steps=1e400", "--config.optim.ema=nan"),
        *("--config.eval.evaluators.x.type=knn", "--config.precision=fp8", "--workdir="),
    ],
    "evaluate --model=MODEL --config=DIGITS": ["--model=/nowhere", "--workdir=x", "--processes=0"],
    "predict --model=MODEL IMAGE": [
        *("--topk=0", "--topk=-1", "--topk=5.5", "--topk=", "--model=", "--batch-size=0"),
        *("--threads=0", "--out=a.txt", "--out=a.npy", "--out=", "--features", "--dense"),
        "--split=train",
    ],
    "convert MODEL TMP/x --format=timm": ["--format=x", "--format=", "--set=a", "--set", "--set="],
    "inspect MODEL": [
        *("--set=num_heads=1.5", "--set=num_heads=0", "--set=depth=x", "--set=image_size=1,2,3"),
        *("--set=gelu=x", "--set=scan=7", "--set=drop_path=x", "--pictures", "--pictures=MODEL"),
        *("--set=patch_size=0", "--set=width=x", "--set=image_size=a"),
    ],
    "prepare TMP TMP/x": [
        *("--short-side=0", "--short-side=x", "--quality=0", "--quality=500", "--examples=-5"),
        *("--examples=0", "--shard-examples=0", "--threads=0", "--split=a/b", "--labels=/nowhere"),
        *("--classes=/nowhere", "--part=x", "--examples=99999999999x"),
    ],
    "preflight --config=DIGITS": ["--topology=x", "--topology=h100:x", "--config=x.py:y"],
    "sweep TMP/none.py --workdir=TMP/s": [
        *("--jobs=0", "--jobs=x", "--nodes=0", "--tasks-per-node=0", "--cpus-per-task=-1"),
        *("--launcher=k8s", "--time=x", "--gpus-per-node=x", "--workdir="),
    ],
    "report TMP": ["--out=x.txt", "--out="],
}


@pytest.mark.parametrize("line", _FLAGS)
def test_a_wrong_value_is_one_sentence(line, capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where what should not be written would be
    for flag in _FLAGS[line]:
        argv = f"{line}\n{flag}"
        image = ROOT / "docs" / "report.png"
        places = {"MODEL": model, "TMP": tmp_path, "DIGITS": DIGITS, "IMAGE": image}
        for name, value in places.items():
            argv = argv.replace(name, str(value))
        told, changed = argv.split("\n")
        err = fails(capsys, *told.split(), changed)
        assert len(err) < 760 and "<class" not in err and "literal" not in err, err
        assert not list(tmp_path.iterdir()) or list(tmp_path.iterdir()) == [tmp_path / "r"], flag


# The machine. ------------------------------------------------------------------------------------

BACKEND = "(set JAX_PLATFORMS='' to automatically choose an available backend)"
ERRORS = {
    "device memory": (
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBuffer"
        ),
        r"^out of the device's memory \(Out of .* allocate 4\.443 GiB\.\): `vit-jax preflight`.* "
        r"optim\.accumulate.* model\.remat=full.* batch_size.*mesh\.fsdp",
    ),
    "TPU memory": (
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 24.53G of 15.48G hbm. Exceeded hbm capacity by 9.05G."
        ),
        "^out of the device's memory .*Used 24.53G of 15.48G",
    ),
    "host memory": (MemoryError(), r"^out of this machine's memory \(MemoryError\): lower data\."),
    "fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), "^out of this machine's memory"),
    "killed worker": (
        RuntimeError(
            "Worker process was terminated unexpectedly with exit code -9. Search the logs above"
        ),
        r"ended by signal 9, as the system does where memory is short: start .* fewer data\.work",
    ),
    "shared memory": (
        RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search"),
        r"signal 7, as where /dev/shm is full: .* a larger /dev/shm",
    ),
    "full": (OSError(errno.ENOSPC, "No space", "x"), "^x: No space: make room or choose another"),
    "rights": (PermissionError(errno.EACCES, "Denied", "x"), "^x: Denied: change who may read"),
    "read only": (OSError(errno.EROFS, "Read-only", "x"), "^x: Read-only: that disk is mounted"),
    "open files": (OSError(errno.EMFILE, "Too many open files", "x"), "^x: .* `ulimit -n 65536`"),
    "folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "^x: .*expected a file"),
    "link": (OSError(errno.ELOOP, "Too many levels", "x", None, "y"), "^x and y: .* in a circle"),
    "name": (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "choose a shorter name"),
    "network": (OSError(errno.ESTALE, "Stale file handle", "x"), "the network to it failed"),
    "no folder": (FileNotFoundError(errno.ENOENT, "None"), "^the current folder is no longer"),
    "no TPU": (
        RuntimeError(
            "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so: libtpu.so: "
            f"cannot open shared object file: No such file or directory {BACKEND}"
        ),
        r"^JAX_PLATFORMS=here, but JAX can use no such device here \(INTERNAL: [^()]*directory\):",
    ),
    "unknown": (
        RuntimeError(
            "Unable to initialize backend 'foo': Backend 'foo' is not in the list of known "
            f"backends: ['cpu', 'tpu']. {BACKEND}"
        ),
        "^JAX_PLATFORMS=here, .*known backends",
    ),
    "TPU in use": (
        RuntimeError(
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process "
            f"with pid 2718466. Not attempting to load libtpu.so in this process. {BACKEND}"
        ),
        "^the TPU is in use by process 2718466: wait",
    ),
    "driver": (
        jax.errors.JaxRuntimeError(
            "FAILED_PRECONDITION: DNN library initialization failed. Look at the errors above"
        ),
        "^the GPU's driver or libraries do not fit this JAX",
    ),
}


def test_what_the_machine_lacks_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "here")
    for error, message in ERRORS.values():
        fail = Mock(side_effect=error)
        monkeypatch.setattr("vit_jax.analysis.preflight.preflight", fail)
        err = fails(capsys, "preflight", f"--config={DIGITS}")
        assert re.search(message, err.removeprefix("error: ")), err


def test_real_allocations_fail_as_out_of_memory():
    for allocate in (lambda: jax.numpy.zeros(2**58, "int8"), lambda: np.zeros(2**58, "int8")):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate()
        assert re.match(r"out of .* memory \(.* 256\.? PiB", sentence(error.value, "predict"))
    assert sentence(RuntimeError("Invalid argument"), "train") is None
    assert sentence(AssertionError(), "train") is None
    assert sentence(FileNotFoundError(errno.ENOENT, "No such file", "x"), "train") is None


def test_what_was_being_done_is_in_the_sentence(model, capsys, monkeypatch):
    """Also where JAX adds notes of its own to the error."""

    def fail(*_):
        jax.numpy.zeros(2**58, "int8")

    monkeypatch.setattr("vit_jax.training.evaluation.predict.Predictor.forward", fail)
    image = ROOT / "docs" / "report.png"
    err = fails(capsys, "predict", f"--model={model}", image)
    assert "out of the device's memory while predicting image 1 (" in err
    assert "allocating 256 PiB.): lower --batch-size" in err


def test_a_gpu_that_lies_idle_is_named_with_what_to_install(caplog):
    log = logging.getLogger("jax._src.xla_bridge")
    log.addFilter(name_extra)
    log.warning(
        "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed. "
        "Falling back to cpu."
    )
    log.removeFilter(name_extra)
    assert caplog.messages[0].endswith(f"to cpu. To use it: {install('cuda')}")


def test_a_platform_that_is_not_here_is_named(monkeypatch):
    """With JAX_PLATFORMS=cuda and no GPU, JAX asserts without a word."""

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("os.path.exists", lambda path: False)
    assert sentence(AssertionError(), "train") == (
        "JAX_PLATFORMS=cuda, but JAX can use no such device here, and there is no NVIDIA GPU (no "
        "/dev/nvidia0): unset it, set JAX_PLATFORMS=cpu, or install JAX for that device: "
        + install("cuda")
    )


def test_extras_are_installed_from_where_the_package_is_from(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert extras.install("cuda").endswith("pip install -e '.[cuda]'")
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "vit_jax" / "x.py"))
    git = {"url": "https://x.org/vit_jax.git", "vcs_info": {"vcs": "git", "commit_id": "6c832a"}}
    gone, here = ({"url": f"file://{tmp_path}{name}"} for name in ("/gone.whl", ""))
    named = "install 'jax[cuda13]>=0.10.0'"
    for record, told in (
        (git, "install 'vit_jax[cuda] @ git+https://x.org/vit_jax.git@6c832a'"),
        ({**git, "subdirectory": "a"}, "vit_jax.git@6c832a#subdirectory=a'"),
        (here, f"install 'vit_jax[cuda] @ file://{tmp_path}'"),
        (gone, named),
        (None, named),
    ):
        text = record and json.dumps(record)
        requires = ["jax>=0.10.0", 'jax[cuda13]>=0.10.0; extra == "cuda"', 'x>=1; extra == "plot"']
        found = Mock(requires=requires, read_text=lambda _, text=text: text)
        monkeypatch.setattr(extras.metadata, "distribution", lambda _, found=found: found)
        assert extras.install("cuda").endswith(told), record


# The shell. --------------------------------------------------------------------------------------


def test_names_that_are_no_text_and_readers_that_go_away(model, tmp_path, monkeypatch):
    name = os.fsencode(tmp_path) + b"/caf\xe9 \xc3\xbc.png"
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding="utf-8", errors="strict")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        assert main(["predict", f"--model={model}", "--topk=1", os.fsdecode(name)]) == 0
    out.flush()
    assert os.fsencode(json.loads(written.getvalue())["file"]) == name
    shell = '$0 -m vit_jax inspect "$1" | true; echo "${PIPESTATUS[0]}"'
    command = ["bash", "-c", shell, sys.executable, str(model)]
    ran = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert (ran.stdout, ran.stderr) == (b"141\n", b"")


def test_json_is_written_as_stdout_can_take_it(monkeypatch):
    for encoding, line in {"utf-8": '"ü"', "ascii": r'"\u00fc"'}.items():
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert as_json("ü") == line
        assert as_json("\udce9") == r'"\udce9"'


def test_a_report_names_folders_that_are_no_text(tmp_path):
    write_atomically(epath.Path(tmp_path / "report.md"), "| r\udce9 ü |")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == r"| r\udce9 ü |"


def test_home_is_where_a_tilde_leads(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text((ROOT / "configs" / "digits.py").read_text())
    assert load_config("~/c.py").batch_size == 64
    vit_jax.save(vit_jax.load(model), "~/m.safetensors")
    assert open_model("~/m.safetensors").card.config.num_classes == 2
    assert main(["convert", "~/m.safetensors", "~/timm", "--format=timm"]) == 0
    capsys.readouterr()
    assert main(["predict", "--model=~/m.safetensors", "~/c.py"]) == 3
    assert json.loads(capsys.readouterr().out)["error"] == "it is of no known format"
    assert {each.name for each in tmp_path.iterdir()} == {"c.py", "m.safetensors", "timm"}
    parser = make_parser(COMMANDS)
    for line in (
        "train --config=c --workdir=~/x",
        "evaluate --model=~/x",
        "inspect ~/x --pictures=~/x",
        "prepare ~/x ~/x --labels=~/x --classes=~/x",
        "data ~/x --model=~/x --pictures=~/x",
        "sweep ~/x --workdir=~/x",
        "report ~/x --out=~/x",
    ):
        assert "~" not in str(vars(parser.parse_args(line.split()))), line
