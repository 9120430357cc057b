"""Masks by ViTs that were pre-trained or not, with a linear head and with a feature pyramid.

`pilot` is where RATES are from: the linear head, with a seed of its own, the best of val. `gpu` is
a wider model that is trained eight times as long, then four times: a guess of what 8 minutes of one
H100 are enough for, not measured.
"""

from vit_jax.launch.sweep import product

config = "configs/segment.py"
BEFORE = {
    "config": "configs/evidence.py:garments",
    "model.image_size": (30, 30),
    "model.patch_size": (6, 6),
    "total_examples": 60_000,
}
OBJECTIVES = {"labels": {}, "masked": {"objective": "masked_colour"}}
STARTS = ("scratch", *OBJECTIVES)
HEADS = {"linear": {}, "pyramid": {"model.pyramid": 32}}
SCENES = "scenes:digits,size=48,examples=600"
AFTER = {
    "data.train.source": SCENES,
    "data.val.source": SCENES,
    "data.test.source": SCENES,
    "data.test.split": "test",
    "model.patch_size": (6, 6),
    "total_steps": 500,
    "eval.every": 0,
    "checkpoint.every": 500,
}
RATES = {"scratch": 4e-3, "labels": 2e-3, "masked": 4e-3}
TRIED = (1e-3, 2e-3, 4e-3)
WIDE = {"model.width": 256, "model.depth": 6, "model.mlp_dim": 512}
SCALES = ("smoke", "pilot", "laptop", "gpu", "paper")


def sweep(scale="laptop"):
    """Yields what is pre-trained, and what learns masks from it or from scratch."""
    if scale == "paper":
        yield {"name": "imagenet21k", "config": "configs/pretrain.py:B/16,imagenet21k"}
        for start, own in {"scratch": {}, "labels": {"init_from": "@imagenet21k"}}.items():
            scenes = "configs/segment.py:B/16,pairs:ADEChallengeData2016"
            yield {"name": f"{start}_linear_0", "config": scenes, **own}
        return
    seeds, starts, heads, before, after, wide = range(8), STARTS, HEADS, {}, {}, {}
    rates = {start: {"": rate} for start, rate in RATES.items()}
    if scale == "smoke":
        starts, seeds, heads = ("labels",), [0], ("linear",)
        before = {"total_examples": 64}
        after = {"total_steps": 2, "optim.warmup": 0.0}
    elif scale == "pilot":
        seeds, heads = [100], ("linear",)
        rates = {start: {f"_{rate:g}": rate for rate in TRIED} for start in STARTS}
    elif scale == "gpu":
        seeds, wide, after = range(3), WIDE, {"total_steps": 2000}
        before = {"total_examples": 480_000, "optim.lr": 1e-3}
    for seed in seeds:
        for start in (each for each in starts if each in OBJECTIVES):
            own = {"name": f"{start}_{seed}", "seed": seed}
            yield {**BEFORE, **own, **OBJECTIVES[start], **wide, **before}
        for point in product({"start": starts, "head": heads}):
            start, head = point.values()
            if head == "pyramid" and start != "labels":
                continue
            origin = wide if start == "scratch" else {"init_from": f"@{start}_{seed}"}
            for ending, rate in rates[start].items():
                name = f"{start}_{head}_{seed}{ending}"
                own = {"name": name, "seed": seed, "optim.lr": rate, **HEADS[head]}
                yield {**AFTER, **origin, **own, **after}
