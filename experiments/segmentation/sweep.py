"""Masks by ViTs that were pre-trained or not, with a linear head and with a feature pyramid.

`pilot` is where RATES are from: the linear head, with a seed of its own, the best of val.
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
SCALES = ("smoke", "pilot", "laptop", "paper")


def sweep(scale="laptop"):
    """Yields what is pre-trained, and what learns masks from it or from scratch."""
    if scale == "paper":
        yield {"name": "imagenet21k", "config": "configs/pretrain.py:B/16,imagenet21k"}
        for start, own in {"scratch": {}, "labels": {"init_from": "@imagenet21k"}}.items():
            scenes = "configs/segment.py:B/16,pairs:ADEChallengeData2016"
            yield {"name": f"{start}_linear_0", "config": scenes, **own}
        return
    seeds, starts, heads, before, after = range(8), STARTS, HEADS, {}, {}
    rates = {start: {"": rate} for start, rate in RATES.items()}
    if scale == "smoke":
        starts, seeds, heads = ("labels",), [0], ("linear",)
        before = {"total_examples": 64}
        after = {"total_steps": 2, "optim.warmup": 0.0}
    elif scale == "pilot":
        seeds, heads = [100], ("linear",)
        rates = {start: {f"_{rate:g}": rate for rate in TRIED} for start in STARTS}
    for seed in seeds:
        for start in (each for each in starts if each in OBJECTIVES):
            own = {"name": f"{start}_{seed}", "seed": seed}
            yield {**BEFORE, **own, **OBJECTIVES[start], **before}
        for point in product({"start": starts, "head": heads}):
            start, head = point.values()
            if head == "pyramid" and start != "labels":
                continue
            own = {} if start == "scratch" else {"init_from": f"@{start}_{seed}"}
            for ending, rate in rates[start].items():
                name = f"{start}_{head}_{seed}{ending}"
                own |= {"name": name, "seed": seed, "optim.lr": rate, **HEADS[head]}
                yield {**AFTER, **own, **after}
