"""Sections 3.2 and 4: a ViT pre-trained, then fine-tuned on few images at two resolutions.

Each seed has about 600 images of its own, 1% of the set. What is pre-trained is fine-tuned at the
higher resolution twice: with its positions interpolated, and, as `fresh`, with new ones in their
place. `pilot` is where RATES are from: digits at 32 pixels, with a seed of its own, the best of
val. `gpu` is a wider model that is pre-trained on 480,000 examples: a guess of what 8 minutes of
one H100 are enough for, not measured.
"""

config = "configs/evidence.py"
# What is learnt from few images, and what from before. These digits are MNIST's.
STARTS = {"digits": ("scratch", "fractals", "garments"), "garments": ("scratch", "fractals")}
FEW = 12_000  # examples: about 20 passes of 600 images
SIDES = (32, 48)  # pixels: 4 x 4 and 6 x 6 patches
WIDE = {"model.width": 256, "model.depth": 6, "model.mlp_dim": 512}
RATES = {"scratch": 2e-3, "fractals": 4e-3, "garments": 4e-3}
TRIED = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SCALES = ("smoke", "pilot", "laptop", "gpu", "paper")


def sweep(scale="laptop"):
    """Yields what is pre-trained, and what is fine-tuned from it or trained from scratch."""
    if scale == "paper":
        yield {"name": "imagenet21k", "config": "configs/pretrain.py:L/16,imagenet21k"}
        for data in ("cifar100", "pets"):
            for side in (224, 384):
                tune = {"config": f"configs/finetune.py:L/16,{data},{side}"}
                yield {"name": f"{data}_{side}", "init_from": "@imagenet21k", **tune}
        return
    starts, sides, seeds, before, after, wide = STARTS, SIDES, range(7), {}, {}, {}
    rates = {start: {"": rate} for start, rate in RATES.items()}
    if scale == "smoke":
        starts, sides, seeds = {"digits": ("garments",)}, SIDES[1:], [0]
        before = after = {"total_examples": 64}
    elif scale == "pilot":
        starts, sides, seeds = {"digits": STARTS["digits"]}, SIDES[:1], [100]
        rates = {start: {f"_{rate:g}": rate for rate in TRIED} for start in RATES}
    elif scale == "gpu":
        wide, seeds = WIDE, range(3)
        before = {"total_examples": 480_000, "optim.lr": 1e-3}
    for seed in seeds:
        for start in ("fractals", "garments"):
            if any(start in each for each in starts.values()):
                yield {
                    "name": f"{start}_{seed}",
                    "config": f"configs/evidence.py:{start}",
                    "seed": seed,
                    **_sides(32),
                    **wide,
                    **before,
                }
        for data, start in [(data, start) for data, each in starts.items() for start in each]:
            own = {"init_from": f"@{start}_{seed}"} if start != "scratch" else wide
            family = ",vit" if start == "scratch" else ""
            for side in sides:
                for ending, rate in rates[start].items():
                    part = seed % 90  # the last 10% are val
                    point = {
                        "name": f"{data}_{start}_{side}_{seed}{ending}",
                        "config": f"configs/evidence.py:few_{data}{family}",
                        "model.image_size": (side, side),
                        "data.train.split": f"train[{part}%:{part + 1}%]",
                        "total_examples": FEW,
                        "seed": seed,
                        "optim.lr": rate,
                        **own,
                        **after,
                    }
                    yield point
                    if side == SIDES[1] and start != "scratch" and scale != "smoke":
                        name = f"{data}_{start}_fresh_{seed}"
                        yield point | {"name": name, "model.fresh": "pos_embed"}


def _sides(side):
    return {"model.image_size": (side, side), "model.patch_size": (8, 8)}
