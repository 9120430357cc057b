"""What XLA is asked for: the table of options, and that they reach the programs we compile."""

import dataclasses
import os
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import DIGITS, TINY, fake_mesh
from flax import nnx

import vit_jax
from vit_jax import compiler
from vit_jax.data.sources import open_source
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.evaluation import Evaluation
from vit_jax.training.plan import TrainingData, make_plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import MeshConfig, make_mesh

YNN = "xla_cpu_experimental_ynn_fusion_type"
REDUCE = "LIBRARY_FUSION_TYPE_REDUCE"
DETERMINISTIC = "xla_gpu_deterministic_ops"
CUBLAS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_dynamic_slice_fusion": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}


@pytest.fixture
def on(monkeypatch):
    """Says on which platform JAX runs; XLA is asked whether it knows an option all the same."""
    monkeypatch.setenv("XLA_FLAGS", "")

    def on(platform):
        device = jax.devices()[0] if platform == "cpu" else SimpleNamespace(platform=platform)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        monkeypatch.setattr(jax, "default_backend", lambda: platform)

    return on


@pytest.mark.parametrize(
    "platform, plain, deterministic",
    [
        ("cpu", {YNN: REDUCE}, {YNN: REDUCE}),
        ("gpu", CUBLAS, CUBLAS | {DETERMINISTIC: True}),
        ("tpu", {}, {}),
        ("another", {}, {}),
    ],
)
def test_each_platform_has_its_options(platform, plain, deterministic, on, monkeypatch):
    monkeypatch.setattr(compiler, "_known", lambda device, name, value: True)
    on(platform)
    assert compiler.compiler_options() == plain
    assert compiler.compiler_options(deterministic=True) == deterministic


def test_a_mesh_says_what_is_compiled_for(on, monkeypatch):
    monkeypatch.setattr(compiler, "OPTIONS", {"cpu": {"a": True}, "gpu": {"b": True}})
    monkeypatch.setattr(compiler, "_known", lambda device, name, value: True)
    mesh = make_mesh(MeshConfig())
    on("gpu")
    assert compiler.compiler_options() == {"b": True}
    assert compiler.compiler_options(mesh) == {"a": True}


def test_a_function_is_traced_for_the_devices_of_its_mesh():
    def fails():
        raise RuntimeError(compiler.target())

    inner = compiler.traced_for(fake_mesh("gpu"), compiler.target)
    outer = compiler.traced_for(fake_mesh("tpu"), lambda: (inner(), compiler.target()))
    assert outer() == ("gpu", "tpu") and compiler.target() == "cpu"
    with pytest.raises(RuntimeError, match="tpu"):
        compiler.traced_for(fake_mesh("tpu"), fails)()
    assert compiler.target() == "cpu"


@pytest.mark.parametrize(
    "platform, queries, merged, jaxs",
    [
        ("cpu", "f32[3,5,3,2,4]", "f32[15,3,2,4]", 0),
        ("gpu", "f32[3,5,2,4]", "f32[15,2,4]", 0),
        ("tpu", "f32[3,5,3,2,4]", None, 1),
    ],
)
def test_each_platform_has_the_products_that_suit_it(platform, queries, merged, jaxs, monkeypatch):
    """Tokens of all images in one dimension, QKV in three, attention that is not JAX's own."""
    called = []

    def attention(q, k, v, bias, *, implementation):
        called.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, scan=True)
    graphdef, params = structure(config)
    forward = compiler.traced_for(
        fake_mesh(platform), lambda params, x: nnx.merge(graphdef, params)(x)
    )
    images = jax.ShapeDtypeStruct((3, 8, 8, 3), np.float32)
    text = str(jax.make_jaxpr(forward)(params, images))
    assert queries in text and ("f32[15," in text) == (merged is not None)
    assert merged is None or merged in text
    assert called == ["xla"] * jaxs


@pytest.mark.parametrize("flags", [f"--{YNN}=X", f"--xla_some=1 --{YNN}=X --xla_more", f"--{YNN}"])
def test_the_environment_goes_before_the_table(flags, on, monkeypatch):
    on("cpu")
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler.compiler_options() == {}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_backend_optimization_level=0 --{YNN}_more=1")
    monkeypatch.setattr(compiler, "_known", lambda device, name, value: True)
    assert compiler.compiler_options() == {YNN: REDUCE}


def test_this_xla_knows_the_table_or_says_so(on, caplog):
    """Later versions may have renamed an option; a value that is misspelt is none of them."""
    on("cpu")
    compiler._known.cache_clear()
    known = compiler.compiler_options()
    assert known == {YNN: REDUCE} or f"{YNN}={REDUCE}, and goes without" in caplog.text
    jax.jit(lambda x: x + 1, compiler_options=known)(1)


@pytest.mark.parametrize(
    "name, value", [("xla_cpu_no_such_option", True), (YNN, "LIBRARY_FUSION_TYPE_NONE_SUCH")]
)
def test_what_this_xla_does_not_know_is_left_out_and_said(name, value, on, monkeypatch, caplog):
    on("cpu")
    good = ("xla_cpu_enable_fast_math", False)
    monkeypatch.setattr(compiler, "OPTIONS", {"cpu": dict([(name, value), good])})
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: x + 1, compiler_options={name: value})(1)
    options = compiler.compiler_options()
    assert options == dict([good])
    assert f"XLA does not take {name}={value}, and goes without" in caplog.text
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    # Once a process: a run compiles several programs.
    caplog.clear()
    assert compiler.compiler_options() == options and not caplog.text


@pytest.fixture
def asked(on, monkeypatch):
    """What every `jax.jit` is given, in order, where the table asks for one thing of each kind."""
    on("cpu")
    monkeypatch.setattr(compiler, "OPTIONS", {"cpu": {"xla_cpu_enable_fast_math": True}})
    deterministic = {"cpu": {"xla_cpu_enable_fast_min_max": False}}
    monkeypatch.setattr(compiler, "DETERMINISTIC", deterministic)
    compiler.compiler_options(deterministic=True)  # asks XLA, by `jax.jit`, once
    seen, jit = [], jax.jit

    def recorded(*args, **kwargs):
        seen.append(kwargs.get("compiler_options"))
        return jit(*args, **kwargs)

    monkeypatch.setattr(jax, "jit", recorded)
    return seen


def program_of(*flags):
    config = load_config(DIGITS, [*TINY, *flags])
    if config.objective.startswith("masked"):  # which has no head, nor anything before it
        model = dict(config.model, representation_size=None)
        config = dataclasses.replace(config, model=model)
    source = open_source("digits", "train")
    plan = make_plan(config, TrainingData.of(source))
    mesh = make_mesh(config.mesh)
    return config, plan.card, mesh, make_program(plan, mesh)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("objective", ["softmax", "masked_colour"])
def test_options_reach_training_and_evaluation(objective, deterministic, asked):
    wanted = {"xla_cpu_enable_fast_math": True}
    wanted |= {"xla_cpu_enable_fast_min_max": False} if deterministic else {}
    flags = [f"--config.mesh.deterministic={deterministic}", f"--config.objective={objective}"]
    config, record, mesh, _ = program_of(*flags)
    assert asked == [wanted]
    asked.clear()
    Evaluation(config, record, mesh)
    # What measures the model, in sums or with a row an image (by one label or several), and reads
    # two kinds of features.
    assert asked == [wanted] * (3 if objective == "masked_colour" else 5)


def test_options_reach_predict(asked, tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=8, num_heads=1)
    vit_jax.save(vit_jax.models.create.create(config), tmp_path / "vit.npz", format="google")
    vit = vit_jax.load(tmp_path / "vit.npz")
    asked.clear()
    list(vit.predict([np.zeros((8, 8, 3), np.uint8)]))
    assert {"xla_cpu_enable_fast_math": True} in asked


def test_a_training_step_leaves_products_to_eigen(on, monkeypatch):
    """What the table is there for: without it, YNNPACK has the products of the compiled step."""
    on("cpu")
    compiler._known.cache_clear()
    size = ["--config.model.width=64", "--config.model.mlp_dim=128", "--config.batch_size=256"]
    quick = "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]  # not as users compile
    emitters = {"xla_cpu_use_fusion_emitters": True} if quick else None

    def products_of_ynnpack():
        *_, program = program_of(*size, "--config.optim.accumulate=1", "--config.model.depth=1")
        lowered = program.step.lower(program.state, program.batch)
        text = lowered.compile(emitters).as_text()
        return re.findall(r'%ynn_fusion[.\d]* = .*op_name="[^"]*/dot_general"', text)

    assert not products_of_ynnpack()
    monkeypatch.setattr(compiler, "OPTIONS", {})
    if not products_of_ynnpack():
        pytest.skip("this XLA gives YNNPACK no products")
