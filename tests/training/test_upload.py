"""Uploads to the Hugging Face hub, up to the call that sends them."""

import json
import os
import shutil
import sys
import types

import numpy as np
import pytest
from conftest import fails
from flax import nnx

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.store import Store
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A huggingface_hub that keeps a copy of what is uploaded."""
    fake = types.ModuleType("huggingface_hub")
    fake.asked, fake.error, fake.folder = [], None, tmp_path / "uploaded"

    class HfApi:
        def create_repo(self, repo_id, **how):
            if fake.error:
                raise fake.error
            fake.asked.append((repo_id, how))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            fake.asked.append(repo_id)
            shutil.rmtree(fake.folder, ignore_errors=True)
            shutil.copytree(folder_path, fake.folder)

    fake.HfApi = HfApi
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: what the card is made of, and a checkpoint."""
    sizes = dict(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=12, num_heads=2)
    model = vit_jax.create("Ti/16", num_classes=2, **sizes)
    folder = tmp_path_factory.mktemp("run")
    ModelCard(model.config, Preprocess((8, 8)), ("cat", "dog")).write(folder)
    store = Store(folder)
    store.save(8, {"params": nnx.to_pure_dict(nnx.state(model))})
    store.close()
    data = {"train": {"source": "folder:/home/me/pets"}, "val": {"source": "digits"}}
    config = {"data": data, "optim": {"name": "sgd"}, "batch_size": 4, "init_from": "/b/S_16.npz"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": 4, "val/top5": 0.5}, {"step": 8, "train/loss": 0.1}]
    lines += [{"step": 8, "val/accuracy": 0.98765}, {"step": 12, "val/accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder)


def test_a_run_is_uploaded_with_its_card(hub, run, capsys):
    argv = ["convert", run, "hf:me/digits", "--format=timm", "--license=mit"]
    assert main(argv) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/digits\n"
    assert hub.asked == [("me/digits", {"private": False, "exist_ok": True}), "me/digits"]
    assert sorted(os.listdir(hub.folder)) == ["README.md", "config.json", "model.safetensors"]
    vit, back = vit_jax.load(run), vit_jax.load(hub.folder)
    np.testing.assert_array_equal(back.model.head.bias[...], vit.model.head.bias[...])
    assert back.labels == vit.labels
    text = (hub.folder / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nlibrary_name: timm\npipeline_tag: image-class")
    for part in (
        'vit_jax.load("hf:me/digits")',
        'timm.create_model("hf-hub:me/digits", pretrained=True)',
        "| train data | folder:pets |",
        "| starting from | S_16.npz |",
        "| metric | at step 8 |\n|---|---|\n| val/accuracy | 0.9877 |\n",
        "then (pixel / 255 - mean) / std",
    ):
        assert part in text
    assert run not in text and "/home" not in text and "top5" not in text and "/b" not in text


def test_a_model_for_transformers(hub):
    vit = vit_jax.create(
        "Ti/16", image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=0
    )
    vit = vit_jax.load(saved(vit, hub.folder.with_suffix(".safetensors")))
    vit_jax.upload(vit, "hf:me/x.y", license="other", format="hf", private=True)
    assert hub.asked[0] == ("me/x.y", {"private": True, "exist_ok": True})
    text = (hub.folder / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction\n" in text
    assert 'transformers.ViTModel.from_pretrained("me/x.y")' in text
    assert "## Training" not in text and "predict" not in text


def saved(vit, path):
    vit_jax.save(vit, path)
    return path


def test_what_is_wrong_is_said(hub, run, capsys, monkeypatch):

    def refused(message, name="hf:me/x", **how):
        with pytest.raises(UserError, match=message):
            vit_jax.upload(run, name, **{"license": "mit", **how})
        assert not hub.asked

    for name in ("me/x", "hf:x", "hf:me/x/y.npz", "hf:me/x@v1"):
        refused("expected hf:OWNER/NAME", name)
    refused("format 'google' on the hub: known: hf, timm", format="google")
    refused("license is '.*'; expected a name", license="")
    refused("license is '.*'; expected a name", license="mit\nevil: true")
    hub.error = PermissionError("403 Forbidden\nmore")
    refused(r"could not be uploaded \(403 Forbidden\): log in by `hf auth login`")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"hf:me/x needs huggingface_hub: .*\[hub\]")
    told = fails(capsys, "convert", run, "hf:me/x", "--format=timm")
    assert "needs --license=NAME" in told
    told = fails(capsys, "convert", run, "x.npz", "--format=google", "--license=mit")
    assert "--license is for the hub" in told


def test_the_card_is_one_of_the_hub(hub, run, monkeypatch):
    vit_jax.upload(run, "hf:me/digits", license="mit")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard.load(hub.folder / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "timm"
    assert card.data.tags == ["vit_jax", "jax"] and card.text.startswith("# digits")
