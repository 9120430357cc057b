"""Eight faked CPU devices, and shapes in signatures enforced, before anything imports jax."""

import dataclasses
import fcntl
import functools
import gc
import importlib.metadata
import json
import logging
import os
import pathlib
import shutil
import sys
import types
from types import SimpleNamespace
from unittest.mock import Mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test, process or run has compiled, the next need not: compiling is most of the time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Unoptimised code compiles twice as fast, without fusion emitters thrice as fast again: compiling
# is where the tests' time goes.
QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):  # later have no such
    QUICK += " --xla_cpu_use_fusion_emitters=false"
EIGHT = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ["XLA_FLAGS"] = f"{EIGHT} {os.environ.get('XLA_FLAGS', '')}"

# A run prints its messages unless a level is set, as the command line does.
logging.getLogger("vit_jax").setLevel(logging.WARNING)

import jaxtyping  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402

_jaxtyped = jaxtyping.jaxtyped
_typed = beartype(conf=BeartypeConf(violation_type=TypeError))  # as jaxtyping's own errors are


def _checked(*, typechecker):
    """`jaxtyped` where a signature has shapes; elsewhere beartype alone.

    jaxtyping's wrapper is slow, and wraps a nested function each time that its outer one is called.
    """

    def decorate(found):
        if not isinstance(found, types.FunctionType) or "jaxtyping." in repr(found.__annotations__):
            return _jaxtyped(typechecker=typechecker)(found)
        checked = _typed(found)

        @functools.wraps(found)
        def call(*args, **kwargs):
            return (found if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

        return call

    return decorate


jaxtyping.jaxtyped = _checked
jaxtyping.install_import_hook("vit_jax", "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from processes import save_arrays_whole  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "experiments" / "benchmarks"
DIGITS = str(ROOT / "configs" / "digits.py")
# The digits config at a size that trains in seconds, with everything switched on.
TINY = [
    "--config.model.width=16",
    "--config.model.depth=2",
    "--config.model.mlp_dim=32",
    "--config.model.num_heads=2",
    "--config.model.representation_size=8",
    "--config.model.dropout=0.1",
    "--config.batch_size=32",
    "--config.total_steps=24",
    "--config.optim.accumulate=2",
    "--config.optim.ema=0.9",
    "--config.eval.every=8",
    "--config.eval.batch_size=64",
    "--config.checkpoint.every=4",
    "--config.checkpoint.keep=2",
    "--config.log.every=3",
]


@pytest.fixture(scope="session", autouse=True)
def whole_arrays():
    """`save_arrays_whole` for all tests; runs of several processes do as users' do."""
    if "vit_jax.checkpoints.store" in sys.modules:
        save_arrays_whole()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run folder of the tiny digits config, and what training returned.

    One worker trains it; each has a copy of its own.
    """
    from vit_jax.training.config_file import load_config
    from vit_jax.training.loop import train

    own = tmp_path_factory.mktemp("run") / "pretrain"
    shared = own.parents[2 if "PYTEST_XDIST_WORKER" in os.environ else 1] / "tiny_run"
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = shared.with_suffix(".json")
        if not result.exists():
            shutil.rmtree(shared, ignore_errors=True)  # of a worker that failed
            result.write_text(json.dumps(train(load_config(DIGITS, TINY), shared)))
    shutil.copytree(shared, own)
    return own, json.loads(result.read_text())


@pytest.fixture
def as_users_have_it():
    """Without the types of signatures enforced, which would refuse much on their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def without_training(patch):
    """Runs of `train` are as they are, but for their steps, which are traced and learn nothing.

    What a new model begins with is drawn here, as no program need be compiled for it.
    """
    import jax
    import jax.numpy as jnp

    from vit_jax.training import loop

    make_program = loop.make_program

    def begin(abstract, config, optimizer, *, seed, params=None):
        random = np.random.default_rng(seed)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
        if params is None:
            params = jax.tree.map_with_path(
                lambda path, leaf: (
                    random.normal(0, 0.02, leaf.shape) * (path[0].key != "head")
                ).astype(leaf.dtype),
                abstract.params,
            )
        ema = None if abstract.ema is None else params
        state = dataclasses.replace(zeros, params=params, ema=ema)
        return jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding, may_alias=False), state, abstract
        )

    def make(*args, **kwargs):
        program = make_program(*args, **kwargs)
        _, metrics = jax.eval_shape(program.step, *program.inputs)
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in metrics.items()}
        return dataclasses.replace(program, step=lambda state, *_: (state, dict(zeros)))

    patch.setattr(loop, "make_program", make)
    patch.setattr(loop, "make_state", begin)


@pytest.fixture
def untrained(monkeypatch):
    """`without_training` for a test."""
    without_training(monkeypatch)


@pytest.fixture
def compiled_once(monkeypatch):
    """All runs of a test are of one config and share its programs, which are compiled once."""
    from vit_jax.training import loop

    make_program, known = loop.make_program, {}

    def make(plan, mesh, phase):
        teacher = plan.teacher and dataclasses.replace(plan.teacher, opened=None)
        key = repr((phase, plan.config, plan.card, teacher))
        if key not in known:
            known[key] = make_program(plan, mesh, phase)
        return known[key]

    monkeypatch.setattr(loop, "make_program", make)


def pytest_collection_finish():
    """What is imported stays: looking for garbage in it was a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(items):
    """The longest go first, so that no worker is left alone with them at the end."""
    long = ("test_buckets.py", "test_distributed.py", "test_resume.py", "test_evidence.py")
    items.sort(key=lambda item: (*long, item.path.name).index(item.path.name))


def fake_mesh(platform):
    """Stands for a mesh of one device in name only, to trace for what is not here."""
    return Mock(spec=Mesh, devices=np.array([SimpleNamespace(platform=platform)]))


def benchmarks(*names):
    """Modules of experiments/benchmarks, which import one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return [importlib.import_module(name) for name in names]


def write_config(path, values):
    """Writes a config file of the source text of its values; returns its path."""
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(dict({values}))\n"
    )
    return str(path)


def fails(capsys, *argv):
    """Runs a command that is a user's mistake; returns its one line."""
    from vit_jax.__main__ import main

    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1
    return captured.err
