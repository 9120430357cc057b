"""Frozen, LoRA, layer decay, full, from scratch: a DINOv2 S/14 on real images, with a few seeds.

    python experiments/packages.py
    vit-jax sweep experiments/finetune/sweep.py --workdir=runs/finetune

Scales: `laptop`, and `smoke` for a step or two of each way.
"""

config = "configs/finetune_own.py:idx:data/fashion_mnist,train[:1%],train[99%:]"

WAYS = {
    "frozen": {"optim.freeze": "backbone", "optim.layer_decay": None},
    "lora": {"model.lora.rank": 8, "optim.layer_decay": None},
    "layer_decay": {},
    "full": {"optim.layer_decay": None},
    "scratch": {"init_from": None, "model.variant": "S/14", "optim.layer_decay": None},
}
# The best of 0.003, 0.01 and 0.03 for `frozen`, on val; for the others what is usual, not tuned.
RATES = {"frozen": 1e-2, "lora": 1e-3, "layer_decay": 3e-4, "full": 1e-4, "scratch": 1e-3}
COMMON = {
    "init_from": "data/dinov2",
    "batch_size": 32,
    "total_epochs": None,
    "total_steps": 100,
    "eval.every": 0,
    "checkpoint.best": None,
    "stop.patience": 0,
    "optim.ema": None,  # of 100 steps, an average would still hold the first
    "data.train.inception_crop.area": (0.7, 1.0),
}


def _of_folders(few, before, test):
    """Trained on the first few of a folder; val is from there, the test from the last fifth."""
    splits = {"train": (before, few), "val": (before, "all[70%:80%]"), "test": (test, "all[80%:]")}
    return {
        f"data.{name}.{key}": value
        for name, (folder, split) in splits.items()
        for key, value in (("source", f"folder:data/{folder}"), ("split", split))
    }


# Images to train on, and to test: 622 and 1,011 garments, 326 and 523 cells, 375 and 399 emoji, as
# both vendors' folders have the same names.
SETS = {
    "garments": {
        "model.image_size": 56,
        "data.test.source": "idx:data/fashion_mnist",
        "data.test.split": "test[:10%]",
    },
    "cells": {"model.image_size": 70, **_of_folders("all[:12%]", "elpv", "elpv")},
    "emoji": {
        "model.image_size": 70,
        **_of_folders("all[:20%]", "emoji_google", "emoji_twitter"),
    },
}
SEEDS = {"garments": 3, "cells": 3, "emoji": 2}
SCALES = ("smoke", "laptop")


def sweep(scale="laptop"):
    """Yields each way, on each set of images, with each seed."""
    few = {"total_steps": 2} if scale == "smoke" else {}
    for seed in (0,) if few else (0, 1, 2):
        for name in (each for each in SETS if seed < SEEDS[each]):
            for way in WAYS:
                point = {**COMMON, **SETS[name], **WAYS[way], "optim.lr": RATES[way], "seed": seed}
                yield {"name": f"{name}_{way}_{seed}", **point, **few}
