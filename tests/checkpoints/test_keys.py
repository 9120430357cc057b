"""Files that hold more than one model's names: prefixes of wrappers, several models, shards."""

import dataclasses
import json

import dialects
import numpy as np
import PIL.Image
import pytest
import resnet_dialects
from conftest import fails, write_config

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.opened import open_model
from vit_jax.errors import UserError

EXAMPLES = dialects.examples()
TIMM, HF, CLIP = EXAMPLES["timm plain"], EXAMPLES["hf vit"], EXAMPLES["hf clip"]


def below(prefix, arrays):
    return {prefix + name: value for name, value in arrays.items()}


def put(folder, example, arrays):
    return dataclasses.replace(example, arrays=arrays).write(folder)


def assert_read(opened, example):
    expected = example.params()
    assert sorted(opened.shapes) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(opened.read(name), value, err_msg=name)


def refused(path, message, **how):
    with pytest.raises(UserError, match=message):
        open_model(path, **how)


# torch.compile, DistributedDataParallel, Lightning, DINO, an averaged model, and all of them.
PREFIXES = {
    **dict.fromkeys(("module.", "_orig_mod.", "model.", "backbone.", "encoder."), "timm plain"),
    **dict.fromkeys(("model_ema.module.", "teacher.backbone.", "state_dict."), "timm registers"),
    **dict.fromkeys(("module._orig_mod.", "student."), "hf vit"),
    "net.vision_tower.": "hf siglip vision",
    "_orig_mod.model.": "hf dinov2",
    "model/": "google paper",
    "state/model/": "big_vision two towers",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_keys_is_taken_off_and_named(prefix, tmp_path):
    example = EXAMPLES[PREFIXES[prefix]]
    opened = open_model(put(tmp_path, example, below(prefix, example.arrays)), **example.known)
    assert_read(opened, example)
    assert opened.facts["prefix"] == f"{prefix}, taken off every key"
    assert all(source.startswith(prefix) for source in opened.sources.values())
    assert set(opened.leftover) == {prefix + name for name in example.leftover}


@pytest.mark.parametrize("name", ["timm  1", "v1 params/ 1", "hybrid timm plain (2, 1) 1"])
def test_the_prefix_of_a_resnet(name, tmp_path):
    example = resnet_dialects.EXAMPLES[name]
    path = put(tmp_path, example, below("module.", example.arrays))
    opened = open_model(path, **example.known)
    assert_read(opened, example)
    assert opened.facts["prefix"] == "module., taken off every key"
    path = put(tmp_path, example, below("module.", example.arrays) | {"odd": np.zeros(2)})
    refused(path, r"such as odd: choose the model by only='module\.\*'", **example.known)


def test_a_prefix_that_not_all_keys_have_is_left(tmp_path):
    """DINO's projection head, and the counter of torch.optim.swa_utils.AveragedModel."""
    for other in ("module.head.mlp.0.weight", "n_averaged"):
        arrays = below("module.backbone.", TIMM.arrays) | {other: np.zeros((2, 2), np.float32)}
        path = put(tmp_path, TIMM, arrays)
        said = rf"other keys than its model's, such as {other}: choose .*only='module.backbone.\*'"
        refused(path, said, num_heads=2)
        opened = open_model(path, num_heads=2, only="module.backbone.*")
        assert_read(opened, TIMM)
        assert list(opened.left_out) == [other]
        assert_read(open_model(path, num_heads=2, ignore=[other]), TIMM)
    missing = {key: value for key, value in TIMM.arrays.items() if key != "norm.bias"}
    path = put(tmp_path, TIMM, below("module.", missing))
    refused(
        path, r"\(without 'module.' before its keys\): the key norm.bias .*missing", num_heads=2
    )


def test_of_two_models_one_is_chosen(tmp_path):
    ema = {name: value + 1 for name, value in TIMM.arrays.items()}
    averaged = dataclasses.replace(TIMM, arrays=ema)
    path = put(tmp_path, TIMM, below("model.", TIMM.arrays) | below("model_ema.module.", ema))
    both = r"only='model\.\*' \(timm\), only='model_ema\.module\.\*' \(timm\)"
    refused(path, f"holds 2 models: choose one by {both}", num_heads=2)
    assert_read(open_model(path, num_heads=2, only="model.*"), TIMM)
    assert_read(open_model(path, num_heads=2, only="model_ema.*"), averaged)
    assert_read(open_model(path, num_heads=2, ignore=("model.*",)), averaged)

    path = put(tmp_path, TIMM, TIMM.arrays | below("ema.", ema))
    refused(path, r"holds 2 models: ignore='ema\.\*' leaves .*, .* by only='ema\.\*'", num_heads=2)
    assert_read(open_model(path, num_heads=2, ignore="ema.*"), TIMM)
    assert_read(open_model(path, num_heads=2, only=["ema.*"]), averaged)


def test_what_is_left_out_is_in_the_report(tmp_path):
    arrays = CLIP.arrays | {"text_model.odd": np.zeros(3, np.float32)}
    vit = vit_jax.load(put(tmp_path, CLIP, arrays), ignore=["text_model.*", "logit_scale"])
    status = {line.name: line.status for line in vit.report.lines}
    assert status["text_model.odd"] == status["logit_scale"] == "left out"
    assert status["visual_projection.weight"] == "left over"
    assert "text_model.odd" in str(vit.report)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path, as_users_have_it):
    path = put(tmp_path, TIMM, TIMM.arrays | below("ema.", TIMM.arrays))
    for pattern, said in {
        "ema": r"ignore='ema' matches no key; did you mean 'ema\.\*'",
        "ema.": r"did you mean 'ema\.\*'",
        "emma.*": r"did you mean 'ema\.\*'",
        "ema.blocks.0.norm1.wieght": "did you mean 'ema.blocks.0.norm1.weight'",
        "nothing/of/it": r"known: .*blocks\.\*, cls_token, .*ema\.\*",
    }.items():
        refused(path, said, ignore=pattern)
    refused(path, "only and ignore leave no key", ignore="*")
    refused(path, "only is 3; expected patterns of keys", only=3)
    refused(path, "ignore is .*; expected patterns of keys", ignore=[None])


def test_on_the_command_line(tmp_path, capsys):
    path = put(tmp_path / "in", TIMM, TIMM.arrays | below("ema.", TIMM.arrays))
    known = ["--set", "num_heads=2"]
    assert main(["inspect", str(path), "--ignore=ema.*", *known]) == 0
    assert "left out  ema.norm.bias" in capsys.readouterr().out
    out = tmp_path / "out.npz"
    argv = ["convert", str(path), str(out), "--format=google", *known]
    assert main([*argv, "--only=ema.blocks.*", "--only=ema.[!b]*"]) == 0
    capsys.readouterr()
    assert_read(open_model(out), TIMM)
    assert "only='emma.*' matches no key" in fails(capsys, "inspect", path, "--only=emma.*")
    run = tmp_path / "run"
    open_model(out).card.write(run)
    assert "run folder, of one model" in fails(capsys, "inspect", run, "--only=a*")


def test_evaluate_and_predict_choose_a_model(tmp_path, capsys):
    """Of two, one says the first class and the other the last."""
    both = {}
    for index, before in enumerate(("first.", "last.")):
        arrays = {name: value.copy() for name, value in HF.arrays.items()}
        arrays["classifier.bias"][:] = 0
        arrays["classifier.bias"][-index] = 1e4
        both |= below(before, arrays)
    path, image = put(tmp_path / "in", HF, both), tmp_path / "x.png"
    PIL.Image.new("RGB", (8, 8)).save(image)
    assert "holds 2 models: choose one by only='first.*'" in fails(
        capsys, "predict", f"--model={path}", image
    )
    for chosen, label in {"--only=last.*": "eel", "--ignore=last.*": "ant"}.items():
        assert main(["predict", f"--model={path}", str(image), "--topk=1", chosen]) == 0
        assert json.loads(capsys.readouterr().out)["labels"] == [[label, 1.0]]
    argv = ["evaluate", f"--model={path}", f"--config={arrays_config(tmp_path)}", "--json"]
    for chosen, right in {"--only=first.*": 4, "--ignore=first.*": 1}.items():
        assert main([*argv, chosen]) == 0
        assert json.loads(capsys.readouterr().out)["val/accuracy"] == right / 8
    said = fails(capsys, "evaluate", f"--workdir={path}", "--only=first.*")
    assert "--only: a run folder is of one model" in said


def arrays_config(folder, more=""):
    """A config with eight black images, of which four are of the first class, one of the last."""
    labels = np.array([0, 0, 0, 0, 1, 2, 3, 4], np.int32)
    np.savez(folder / "x.npz", val_images=np.zeros((8, 8, 8, 3), np.uint8), val_labels=labels)
    split = f"dict(source='arrays:{folder}/x.npz', split='val', classes='in_order')"
    return write_config(
        folder / "c.py",
        f"batch_size=8, data=dict(val={split}, train={split}, same_images=True), {more}",
    )


def test_init_from_chooses_a_model(tmp_path, capsys, untrained):
    other = {name: value + 1 for name, value in HF.arrays.items()}
    path = put(tmp_path / "in", HF, below("online.", HF.arrays) | below("mean.", other))
    optim = "optim=dict(name='sgd', lr=0.1), total_steps=1, model=dict(head='keep')"
    argv = ["train", f"--config={arrays_config(tmp_path, optim)}", f"--workdir={tmp_path}/run"]
    start = f"--config.init_from={path}"
    assert "init_from, these are model.only and model.ignore" in fails(capsys, *argv, start)
    assert main([*argv, start, "--config.model.only=mean.*", "--json"]) == 0
    trained = open_model(tmp_path / "run")
    for name, value in HF.params().items():
        np.testing.assert_array_equal(trained.read(name), value + 1, err_msg=name)
    capsys.readouterr()
    said = fails(capsys, *argv, start, "--config.model.only=online.*")
    assert "holds a run of another config (model.only: ['mean.*'] -> ['online.*'])" in said
    said = fails(capsys, *argv, "--config.model.ignore=mean.*")
    assert "model.ignore chooses keys of init_from, which is not set" in said


# -- Shards --------------------------------------------------------------------------------------


def test_an_array_is_in_the_shard_that_the_index_says(tmp_path):
    path = EXAMPLES["hf sharded"].write(tmp_path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    place = content["weight_map"]
    for change, said in (
        ({"none.weight": place["classifier.bias"]}, "none.weight is in .*, but none has it"),
        (
            {"classifier.bias": place["classifier.weight"]},
            rf"that classifier.bias is in {place['classifier.weight']}, but it is in",
        ),
    ):
        index.write_text(json.dumps(content | {"weight_map": place | change}))
        refused(path, said)
    index.write_text(json.dumps(content))
    shard = path / "model-00002-of-00003.safetensors"
    refused(shard, "is one of several shards of a model: name .*index.json")
    shard.unlink()
    refused(path, "no file .*00002.*, one of the 3 shards .*: 1 of them are missing here")
    index.unlink()
    refused(path / "model-00001-of-00003.safetensors", "name the folder, with its model.safetens")
    refused(path, "several weight files")
