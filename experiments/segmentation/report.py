"""The paper ends with what it leaves open: other tasks, such as detection and segmentation. This is
the smallest step there. The features of the patches of a frozen ViT (`capture="encoded"`) are
read by one linear layer, whose logits are stretched to the image, and which learns the masks of
scenes made on the spot (`scenes:digits`, three digits on a noisy canvas, one class for each and
one for the background; 500 scenes to learn from, 250 to test, 20 steps of L-BFGS).

ViTs of patches of 4x4 pixels were pre-trained on 24x24 images of fractals (`configs/evidence.py`)
by labels or by masked patches, or not at all, and never saw a scene. The same weights are read at
24x24 pixels and, with positions interpolated, at 48x48; those that were not trained are drawn for
each size.
"""

import dataclasses
import tempfile
from pathlib import Path

from reporting import Mean, Told, table

TITLE = "Beyond classification: segmentation"
CLAIM = "Conclusion: ViTs should serve for dense tasks too (the paper shows none)"
NAMES = {"random": "not trained", "masked": "masked patches", "labels": "labels"}
SIZES = (24, 48)
SCENES = "scenes:digits,size=48,examples=250"
STEPS = 20


def measure(runs, folder):
    """mIoU and pixel accuracy for each model and size; draws the picture with the first run."""
    import vit_jax
    from vit_jax.training.config_file import load_config
    from vit_jax.training.evaluation.evaluate import evaluate_run

    config = load_config(
        str(Path(__file__).parents[2] / f"configs/evaluate.py:scenes,{SCENES}"),
        [f"--config.eval.evaluators.scenes.{flag}" for flag in ("l2=(1e-3,)", f"steps={STEPS}")],
    )
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for run in sorted(path for path in Path(runs).iterdir() if (path / "config.json").exists()):
            kind, seed = run.name.split("_")
            for size in SIZES:
                vit = vit_jax.load(run, image_size=size)
                models = {kind: vit.model}
                if kind == "labels":
                    models["random"] = vit_jax.create(vit.config, seed=1000 + int(seed))
                for name, model in models.items():
                    file = Path(scratch) / f"{name}_{size}.safetensors"
                    vit_jax.save(dataclasses.replace(vit, model=model), file, format="vit_jax")
                    values = evaluate_run(file, config)
                    values = {key.removeprefix("scenes/"): x for key, x in values.items()}
                    found.append({"name": name, "seed": int(seed), "size": size, **values})
                if kind == "labels" and seed == "0" and size == SIZES[-1]:
                    picture(vit, config).savefig(Path(folder) / "picture.png", dpi=110)
    return found


def picture(vit, config, learn=500, count=6):
    """Test scenes, their masks, and what a linear layer on the patches finds."""
    import numpy as np

    from vit_jax.analysis.plots import segmented
    from vit_jax.data.pipeline import BatchReader
    from vit_jax.data.sources import open_source
    from vit_jax.training.evaluation.segmentation import Dense, fit_head, predict

    head, images, masks = config.eval.evaluators["scenes"], {}, {}
    features = {}
    for part, number in (("train", learn), ("test", count)):
        split = getattr(head, part)
        source = open_source(split.source, split.split)
        first = np.arange(min(number, len(source)))
        batch = BatchReader.of(source, split, vit.preprocess)(first, first)
        images[part], masks[part] = batch["image"], batch["label"].astype(np.int32)
        features[part] = np.asarray(vit.model.dense(vit.preprocess.normalise(batch["image"])))
    classes = len(open_source(head.train.source, "train").label_names)
    fitted = fit_head(Dense(features["train"], masks["train"]), classes, l2=1e-3, steps=head.steps)
    predictions = predict(fitted, features["test"], masks["test"].shape[1:])
    return segmented(images["test"], masks["test"], predictions)


def tell(points, measured):
    """Is a trained ViT better than one that is not, and is a higher resolution better?"""
    groups = {}
    for each in measured:
        groups.setdefault((each["name"], each["size"]), []).append(each)
    miou = {key: Mean(tuple(x["miou"] for x in values)) for key, values in groups.items()}
    pixels = {key: Mean(tuple(x["accuracy"] for x in values)) for key, values in groups.items()}
    order = [(name, size) for name in NAMES for size in SIZES if (name, size) in miou]
    rows = [(NAMES[n], f"{size}x{size}", miou[n, size], pixels[n, size]) for n, size in order]
    header = ("pre-training", "pixels", "mIoU", "pixel accuracy")
    if len(order) < len(NAMES) * len(SIZES):
        return Told(table(header, rows), "", "", "")
    large = SIZES[-1]
    best = max(("labels", "masked"), key=lambda name: miou[name, large].mean)
    verdict = f"At {large}x{large} pixels the patches of a ViT trained by {NAMES[best]} give an "
    verdict += f"mIoU of {miou[best, large]}, of one that is not trained {miou['random', large]}."
    gain = miou[best, large].mean - miou[best, SIZES[0]].mean
    verdict += (
        f" From {SIZES[0]} to {large} pixels it changes by {gain:+.1%}. The picture: scenes, "
    )
    verdict += "true masks, and what the linear layer finds (labels, seed 0)."
    trained = miou[best, large].beats(miou["random", large])
    agrees = "trained features are better than random ones" if trained else "no gain from training"
    short = f"mIoU at {large} pixels: " + ", ".join(
        f"{NAMES[name]} {miou[name, large]}" for name in NAMES
    )
    return Told(table(header, rows), verdict, short, agrees)
