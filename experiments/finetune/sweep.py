"""Frozen, LoRA, layer decay, full, from scratch: a DINOv2 S/14 on real images, three seeds.

    python experiments/packages.py
    vit-jax sweep experiments/finetune/sweep.py --workdir=runs/finetune

Scales: `garments` (Fashion-MNIST at 56 pixels), `cells` (solar cells at 84), `laptop` for both,
`rates` to choose the learning rates on images that are neither trained nor tested on, `smoke`.
"""

config = "configs/finetune_own.py:idx:data/fashion_mnist,train[:1%],train[97%:]"

# The learning rate of each is the better of two that `rates` has.
WAYS = {
    "frozen": {"optim.freeze": "backbone", "optim.layer_decay": None},
    "lora": {"model.lora.rank": 8, "optim.layer_decay": None},
    "layer_decay": {},
    "full": {"optim.layer_decay": None},
    "scratch": {"init_from": None, "model.variant": "S/14", "optim.layer_decay": None},
}
RATES = {"frozen": 1e-2, "lora": 1e-3, "layer_decay": 3e-4, "full": 1e-4, "scratch": 1e-3}
COMMON = {
    "init_from": "data/dinov2",
    "batch_size": 32,
    "total_epochs": 10.0,
    "eval.every": 0,
    "checkpoint.best": None,
    "stop.patience": 0,
    "optim.ema": None,  # of 200 steps, an average would still hold the first
    "data.train.inception_crop.area": (0.7, 1.0),
}
# 305 cells to train on, 531 to test.
CELLS = {
    f"data.{name}.{key}": value
    for name, split in (("train", "all[:12%]"), ("val", "all[70%:80%]"), ("test", "all[80%:]"))
    for key, value in (("source", "folder:data/elpv"), ("split", split))
}
SETS = {
    "garments": {
        "model.image_size": 56,
        "data.test.source": "idx:data/fashion_mnist",
        "data.test.split": "test[:20%]",
    },
    "cells": {"model.image_size": 84, **CELLS},
}


def sweep(scale="laptop"):
    """Yields each way with each seed, on each set of images."""
    if scale == "rates":
        for way, rate in RATES.items():
            for lr in (rate, 3 * rate):
                point = {**COMMON, "model.image_size": 56, **WAYS[way], "optim.lr": lr}
                yield {"name": f"{way}_{lr:g}", **point}
        return
    if scale not in ("laptop", "smoke", *SETS):
        raise ValueError(f"scale {scale!r}: expected laptop, {', '.join(SETS)}, rates or smoke")
    few = {"total_epochs": None, "total_examples": 64} if scale == "smoke" else {}
    for name in SETS if scale == "laptop" else ("garments",) if scale == "smoke" else (scale,):
        for seed in (0,) if few else (0, 1, 2):
            for way in WAYS:
                point = {**COMMON, **SETS[name], **WAYS[way], "optim.lr": RATES[way], "seed": seed}
                yield {"name": f"{name}_{way}_{seed}", **point, **few}
