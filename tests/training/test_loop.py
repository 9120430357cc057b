"""The run as a whole: what it writes, how it starts, evaluates and stops."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import scipy.ndimage
from conftest import DIGITS, TINY
from flax import nnx
from flax.traverse_util import flatten_dict

import vit_jax
from vit_jax.checkpoints.opened import open_model, read_model
from vit_jax.data.sources import open_source
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.create import init_params
from vit_jax.training import loop
from vit_jax.training.config import read_config, to_json
from vit_jax.training.config_file import load_config
from vit_jax.training.evaluation.evaluate import evaluate_run
from vit_jax.training.loop import train
from vit_jax.training.metrics import read_metrics
from vit_jax.training.plan import Plan, TrainingData, make_plan


def config_of(*overrides, arg=""):
    return load_config(DIGITS + arg, [*TINY, *overrides])


def test_a_run_folder_has_what_was_promised(tiny_run):
    workdir, result = tiny_run
    assert {p.name for p in workdir.iterdir()} >= {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "model",
        "tensorboard",
    }
    assert list((workdir / "tensorboard").glob("events.*"))
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["20", "24"]
    record = json.loads((workdir / "model" / "model.json").read_text())
    assert record["grid"] == [4, 4] and record["num_prefix_tokens"] == 1
    assert record["labels"] == [str(i) for i in range(10)]
    assert record["preprocess"]["mean"] == record["preprocess"]["std"] == 0.5
    assert read_config(workdir) == config_of()

    lines = read_metrics(workdir)
    assert [x["step"] for x in lines if "train/loss" in x] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [x["step"] for x in lines if "val/accuracy" in x] == [8, 16, 24]
    assert [x["step"] for x in lines if "test/accuracy" in x] == [24]
    assert result["test/accuracy"] == lines[-1]["test/accuracy"]
    first = lines[0]
    assert first["train/loss"] == pytest.approx(np.log(10), rel=0.1)  # a zero head knows nothing
    assert 0 <= first["input_wait_fraction"] <= 1 and first["images_per_second"] > 0


def test_evaluate_repeats_what_training_printed(tiny_run):
    """In batches that divide nothing."""
    workdir, result = tiny_run
    config = config_of("--config.eval.batch_size=50")
    again = evaluate_run(workdir, config)
    assert again.pop("step") == 24
    assert set(again) == {f"{s}/{n}" for s in ("val", "test") for n in ("accuracy", "top5", "loss")}
    for name, value in again.items():
        assert value == pytest.approx(result[name], rel=1e-5 if "loss" in name else 0), name


def test_the_accuracy_is_that_of_the_loaded_model(tiny_run):
    workdir, result = tiny_run
    vit = vit_jax.load(workdir)
    source = open_source("digits", "test")
    images = np.stack([vit.preprocess(image) for image in source.images])
    logits = np.asarray(jax.jit(vit.model)(images))
    assert np.mean(np.argmax(logits, 1) == source.labels) == result["test/accuracy"]
    best5 = np.argsort(-logits, 1)[:, :5]
    assert np.mean((best5 == source.labels[:, None]).any(1)) == result["test/top5"]


def test_finetuning_keeps_resizes_and_renews(tiny_run, tmp_path, caplog, untrained):
    workdir, _ = tiny_run
    caplog.set_level("INFO", "vit_jax")
    overrides = [f"--config.init_from={workdir}", "--config.total_steps=1"]
    overrides.append("--config.model.head=fresh")
    overrides.append("--config.batch_size=8")
    config = load_config(f"{DIGITS}:finetune", overrides)
    train(config, tmp_path / "tuned")
    tuned, old = vit_jax.load(tmp_path / "tuned"), vit_jax.load(workdir)

    assert tuned.config.image_size == (16, 16) and tuned.config.grid == (8, 8)
    assert (tuned.config.width, tuned.config.depth) == (16, 2)
    assert tuned.config.representation_size is None
    assert tuned.preprocess.image_size == (16, 16)
    new, before = (
        flatten_dict(nnx.to_pure_dict(nnx.state(x.model)), sep="/") for x in (tuned, old)
    )
    assert not new["head/kernel"].any() and new["head/kernel"].shape == (16, 10)
    grid = np.asarray(before["pos_embed"][1:]).reshape(4, 4, 16)
    expected = scipy.ndimage.zoom(grid, (2, 2, 1), order=1).reshape(64, 16)
    np.testing.assert_allclose(new["pos_embed"][1:], expected, rtol=1e-6)
    np.testing.assert_array_equal(new["pos_embed"][0], before["pos_embed"][0])
    same = set(new) - {"pos_embed", "head/kernel", "head/bias"}
    assert len(same) == 17
    for name in same:
        np.testing.assert_array_equal(new[name], before[name], err_msg=name)
    for sentence in (
        "pos_embed +resized 4x4 -> 8x8",
        "head/kernel +fresh",
        "pre_logits/.* dropped",
        "^devices     8 x cpu, .* GiB of memory each, mesh data=8$",
        "^model       ViT with width 16, depth 2; 16x16 pixels, 10 classes, 5,786 parameters$",
        "^steps       1 of 8 images each, 0.006354 epochs; val is measured at the end alone",
        f"^run folder  {tmp_path}/tuned, saved every 200 steps or 10 minutes, and at the end$",
        "^compiled in .* s$",
    ):
        assert any(re.search(sentence, r.getMessage()) for r in caplog.records)


def test_parts_of_a_checkpoint_start_anew(tiny_run, tmp_path, untrained, caplog):
    caplog.set_level("INFO", "vit_jax")
    flags = [f"--config.init_from={tiny_run[0]}", "--config.total_steps=1", "--config.optim.lr=0"]
    flags += ["--config.model.fresh=pos_embed,blocks/norm?/scale", "--config.optim.warmup=0"]
    config = config_of(*flags)
    train(config, tmp_path / "anew")
    old, new = read_model(tiny_run[0]), read_model(tmp_path / "anew")
    made = flatten_dict(init_params(new[0].config, config.seed), sep="/")
    old, new = (flatten_dict(each[1], sep="/") for each in (old, new))
    anew = {name for name in new if not np.array_equal(new[name], old[name])}
    assert anew == {"pos_embed", "blocks/norm1/scale", "blocks/norm2/scale"}
    for name in anew:
        np.testing.assert_allclose(new[name], made[name], rtol=1e-6)
    for name, sentence in (
        (
            "pos_embd",
            "model.fresh has 'pos_embd', which matches no parameter; did you mean 'pos_embed",
        ),
        ("head/*", "leave one out"),
    ):
        lora = ["--config.model.lora.rank=2"] if name == "head/*" else []
        with pytest.raises(UserError, match=re.escape(sentence)):
            train(config_of(*flags[:2], f"--config.model.fresh={name}", *lora), tmp_path / "no")


def test_a_run_of_the_same_classes_goes_on_with_the_head(tiny_run, tmp_path, untrained, caplog):
    caplog.set_level("INFO", "vit_jax")
    workdir, _ = tiny_run
    flags = [f"--config.init_from={workdir}", "--config.total_steps=1", "--config.optim.warmup=0"]
    config = config_of(*flags)
    train(config, tmp_path / "kept")
    step, old, new = 24, read_model(workdir), read_model(tmp_path / "kept")
    assert old[2] == step and new[0].config.representation_size == 8
    jax.tree.map(np.testing.assert_array_equal, new[1], old[1])
    said = "the head of init_from is kept, as it is a run of the same classes: --config.model.head"
    assert caplog.text.count(said) == 1

    # A run that was begun with a new head, by another version, goes on with that.
    fresh = dataclasses.replace(config, model={**config.model, "head": "fresh"})
    train(fresh, tmp_path / "fresh")
    (tmp_path / "fresh" / "config.json").write_text(to_json(config))
    train(config, tmp_path / "fresh")
    assert not read_model(tmp_path / "fresh")[1]["head"]["kernel"].any()
    assert caplog.text.count(said) == 1


def decision(config, base, labels):
    """Whether the head is kept, and the classes."""
    plan = make_plan(config, TrainingData(labels), base)
    return plan.keep_head, plan.card.labels


def test_only_the_whole_head_of_a_run_is_kept_unasked(tiny_run, tmp_path):
    run = open_model(tiny_run[0])
    labels, config = run.card.labels, config_of(f"--config.init_from={tiny_run[0]}")
    assert decision(config, run, labels) == (True, labels)
    assert decision(config, run, labels[::-1]) == (True, labels)  # matched by name
    others = tuple(f"a{label}" for label in labels)
    assert decision(config, run, others) == (False, others)
    assert decision(config, run, labels[:9]) == (False, labels[:9])
    several = ("0", "00", *labels[1:])
    assert decision(config, run, several) == (False, several)
    for flag in ("objective=sigmoid", "model.pool=gap", "model.representation_size=4"):
        changed = config_of(f"--config.init_from={tiny_run[0]}", f"--config.{flag}")
        assert decision(changed, run, labels) == (False, labels), flag
    vit_jax.save(vit_jax.load(tiny_run[0]), tmp_path / "x.safetensors")
    assert decision(config, open_model(tmp_path / "x.safetensors"), labels) == (False, labels)


def test_a_run_starts_from_weights_of_another_code_base(tiny_run, tmp_path, untrained):
    """Positions, preprocessing and parameters are those of the file; evaluation takes it too."""
    vit = vit_jax.load(tiny_run[0], num_classes=10)  # timm has no hidden layer before the head
    other = Preprocess((8, 8), 1, resize="area", resize_dtype="float32", mean=0.25, std=0.5)
    file = tmp_path / "timm.safetensors"
    vit_jax.save(dataclasses.replace(vit, preprocess=other), file, format="timm")
    flags = [f"--config.init_from={file}", "--config.total_steps=1"]
    train(config_of(*flags, "--config.model.image_size=(16, 16)"), tmp_path / "tuned")
    record, params, _ = read_model(tmp_path / "tuned")
    assert record.preprocess == dataclasses.replace(other, image_size=(16, 16))
    np.testing.assert_array_equal(params["cls_token"], vit.model.cls_token[...])
    expected = scipy.ndimage.zoom(
        np.asarray(vit.model.pos_embed)[1:].reshape(4, 4, 16), (2, 2, 1), order=1
    )
    np.testing.assert_allclose(params["pos_embed"][1:], expected.reshape(64, 16), rtol=1e-5)
    # The fresh head is zero, so that every class costs log 10.
    assert evaluate_run(file, config_of())["val/loss"] == pytest.approx(np.log(10), rel=1e-5)


def test_a_resumed_run_needs_its_origin_no_more(tiny_run, tmp_path, untrained):
    origin = tmp_path / "origin"
    shutil.copytree(tiny_run[0], origin)
    config = config_of(f"--config.init_from={origin}", "--config.total_steps=4")
    first = train(config, tmp_path / "tuned")
    shutil.rmtree(origin)
    assert train(config, tmp_path / "tuned") == first


def test_a_damaged_checkpoint_is_named_and_made_again(tiny_run, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    newest = workdir / "checkpoints" / "24"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 8
    victim.write_bytes(content)

    result = train(config_of(), workdir)
    assert str(victim) in caplog.text and "does not match its checksum" in caplog.text
    for name, value in tiny_run[1].items():
        if name.startswith(("train/", "val/", "test/")):
            assert result[name] == value, name
    assert vit_jax.load(workdir).step == 24


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    flags = ["--config.optim.lr=1e10", "--config.optim.schedule=constant"]
    flags += ["--config.optim.warmup=0", "--config.checkpoint.every=1", "--config.model.dropout=0."]
    with pytest.raises(UserError, match=r"at step (\d+) .* is saved in") as error:
        train(config_of(*flags), tmp_path / "run")
    bad = int(str(error.value).split("at step ")[1].split()[0])
    kept = read_model(tmp_path / "run")
    assert kept[2] < bad
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept[1]))
    assert all(line["step"] < bad for line in read_metrics(tmp_path / "run"))


def test_objective_smoothing_precision_and_seed_reach_the_run(tmp_path, monkeypatch):
    """In bfloat16, with parameters in float32."""
    seeds = []
    for where, name in ((loop, "make_state"), (Plan, "reader")):
        call = getattr(where, name)

        def note(*args, call=call, **kwargs):
            seeds.append(kwargs["seed"] if "seed" in kwargs else args[0].config.seed)
            return call(*args, **kwargs)

        monkeypatch.setattr(where, name, note)
    flags = ["--config.objective=sigmoid", "--config.augment.label_smoothing=0.1"]
    flags += ["--config.precision=bfloat16", "--config.seed=7", "--config.optim.lr=0"]
    flags += ["--config.model.depth=1", "--config.optim.accumulate=1"]
    train(config_of(*flags, "--config.total_steps=3"), tmp_path)
    assert seeds == [7, 7]
    # A zero head gives ten logits of zero, each of which costs log 2.
    first = read_metrics(tmp_path)[0]
    assert first["train/loss"] == pytest.approx(10 * np.log(2), rel=1e-5)
    vit = vit_jax.load(tmp_path)
    assert [p for _, p in next(vit.predict([np.zeros((8, 8), "uint8")]))] == [0.5] * 5
    assert {leaf.dtype for leaf in jax.tree.leaves(read_model(tmp_path)[1])} == {np.dtype("f4")}
