"""Uploads a model to the Hugging Face hub, in a form that timm or transformers load."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from vit_jax.checkpoints.export import save
from vit_jax.checkpoints.files import read_json
from vit_jax.checkpoints.load import Loaded, load
from vit_jax.errors import UserError, nearest
from vit_jax.extras import install
from vit_jax.training.metrics import read_metrics
from vit_jax.writing import write_atomically

# Folders that a library loads from the hub by itself, and how.
FORMATS = {
    "timm": ("timm", 'model = timm.create_model("hf-hub:{}", pretrained=True)'),
    "hf": ("transformers", 'model = transformers.{kind}.from_pretrained("{}")'),
}
_NAME = r"hf:(?://)?([\w.-]+/[\w.-]+)"


def upload(
    model: Loaded | epath.PathLike,
    name: str,
    *,
    license: str,
    format: str = "timm",
    private: bool = False,
) -> str:
    """Uploads a model with its config files and a model card, README.md; overwrites what is there.

    Args:
      model: the result of `load`, or what it takes; of a run folder, the card has its data and the
        metrics of its last checkpoint.
      name: "hf:OWNER/NAME"; made if it does not exist.
      license: the hub's name of the licence, such as "apache-2.0" or "other": it is never guessed.
      format: of `save`: timm or hf.
      private: whether a new repository is private.

    Returns:
      The repository's address.

    Raises:
      UserError: no such name or format, a model that the format cannot hold, or a failed upload.
    """
    match = re.fullmatch(_NAME, name)
    if not match:
        raise UserError(f"{name!r}: expected hf:OWNER/NAME")
    if format not in FORMATS:
        raise UserError(f"format {format!r} on the hub: {nearest(format, FORMATS)}")
    if not re.fullmatch(r"[a-z0-9][\w.-]*", license):
        raise UserError(
            f"license is {license!r}; expected a name of https://huggingface.co/docs/hub/"
            "repositories-licenses, such as apache-2.0, mit, or other"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{name} needs huggingface_hub: {install('hub')}") from None
    run = None
    if not isinstance(model, Loaded):
        run = epath.Path(model) if (epath.Path(model) / "model" / "model.json").exists() else None
        model = load(model)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, format=format)
        config = read_json(os.path.join(folder, "config.json"))
        text = card(model, match[1], license, format, config, run)
        write_atomically(os.path.join(folder, "README.md"), text)
        try:
            api = huggingface_hub.HfApi()
            address = api.create_repo(match[1], private=private, exist_ok=True)
            api.upload_folder(
                repo_id=match[1], folder_path=folder, commit_message="Upload with vit_jax"
            )
        except Exception as error:  # they have no class in common: httpx's, OSError, ValueError
            reason = (str(error) or type(error).__name__).strip().splitlines()[0][:300]
            raise UserError(
                f"{name} could not be uploaded ({reason}): log in by `hf auth login` with a token "
                "that may write there"
            ) from error
    return str(address)


def card(
    vit: Loaded,
    repository: str,
    license: str,
    format: str,
    config: Mapping[str, Any],
    run: epath.Path | None,
) -> str:
    """The text of a model card: what the model is, how to load it, and how it was trained.

    Args:
      config: the config.json beside it.
      run: its run folder, if there is one.
    """
    library, line = FORMATS[format]
    classes = vit.config.num_classes
    line = line.format(repository, kind=(config.get("architectures") or [""])[0])
    facts = {
        name: what for name, what in vit.report.facts.items() if name not in ("file", "prefix")
    }
    pre = vit.preprocess
    shape = f"{pre.image_size[0]}x{pre.image_size[1]}, {pre.aspect}, crop {pre.crop:.4g}"
    if pre.max_patches is not None:
        shape = "at most {} patches of {}x{}, whole".format(pre.max_patches, *pre.patch_size)
    facts["preprocessing"] = (
        f"{pre.resize} to {shape}; then (pixel / 255 - mean) / std with mean {pre.mean}, "
        f"std {pre.std}"
    )
    if classes:
        facts["outputs"] = f"{classes} logits ({vit.objective})"
    task = "image-classification" if classes else "image-feature-extraction"
    head = {"license": license, "library_name": library, "pipeline_tag": task}
    lines = ["---", *(f"{name}: {value}" for name, value in head.items())]
    lines += ["tags:", "- vit_jax", "- jax", "---", f"# {repository.partition('/')[2]}", ""]
    lines += [*_table("model", "", facts), "", "## Use", "```python", "import vit_jax", ""]
    lines += [f'vit = vit_jax.load("hf:{repository}")', 'print(*vit.predict(["image.jpg"]))']
    lines[-1] = lines[-1] if classes else "print(vit.report)"
    lines += ["```", f"In {library}:", "```python", f"import {library}", "", line, "```"]
    if run is not None:
        lines += ["", "## Training", *_table("trained with", "", _trained(run))]
        lines_of_step = [line for line in read_metrics(run) if line["step"] == vit.step]
        each = (item for line in lines_of_step for item in line.items())
        if measured := {k: v for k, v in each if k.startswith(("val/", "test/"))}:
            shown = {name: f"{value:.4g}" for name, value in measured.items()}
            lines += ["", "## Results", *_table("metric", f"at step {vit.step}", shown)]
    return "\n".join([*lines, ""])


def _trained(run: epath.Path) -> dict[str, str]:
    config = json.loads((run / "config.json").read_text())
    found = {f"{split} data": (config["data"].get(split) or {}) for split in ("train", "val")}
    # The folders of this machine are nobody else's business.
    said = {
        name: re.sub(r"[^:,]*/", "", p["source"]) for name, p in found.items() if p.get("source")
    }
    if config.get("init_from"):
        said["starting from"] = os.path.basename(str(config["init_from"]).rstrip("/"))
    return {**said, "optimiser": config["optim"]["name"], "batch size": str(config["batch_size"])}


def _table(first: str, second: str, rows: Mapping[str, str]) -> list[str]:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    start = [f"| {first} | {second} |", "|---|---|"]
    return [*start, *(f"| {cell(name)} | {cell(what)} |" for name, what in rows.items())]
