"""Figure 5: ViTs, ResNets and hybrids of several sizes, each trained on as many images.

A family's rate is that of `../data_size/sweep.py`; `pilot` asks whether the widest want less, with
a seed of its own. `gpu` is wider, longer and at half the rates, a guess of what 8 minutes of
one H100 are enough for, not measured.
"""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"


def _vit(width, depth=4):
    return {"model.width": width, "model.depth": depth, "model.mlp_dim": 2 * width}


def _resnet(units, width=32):
    return {"model.resnet": units, "model.resnet_width": width}


SIZES = {
    "vit": [_vit(32), _vit(64), _vit(128)],
    "resnet": [_resnet((1,)), _resnet((1, 1)), _resnet((1, 1, 1))],
    "hybrid": [_vit(32), _vit(64), _vit(96)],
}
WIDER = {
    "vit": [_vit(64), _vit(128), _vit(256, 6)],
    "resnet": [_resnet((1, 1)), _resnet((2, 2)), _resnet((2, 2), 64)],
    "hybrid": [_vit(64), _vit(128), _vit(256, 6)],
}
RATES = {"vit": (2e-3, 2e-3, 1e-3), "resnet": (8e-3,) * 3, "hybrid": (2e-3, 2e-3, 1e-3)}
# Table 6's models on JFT-300M.
LARGE = "B/32 B/16 L/32 L/16 H/14 R50x1 R50x2 R101x1 R152x1 R152x2 R200x3 R50+B/32 R50+B/16 "
LARGE = [*(LARGE + "R50+L/32 R50+L/16").split()]
SCALES = ("smoke", "pilot", "laptop", "gpu", "paper")


def sweep(scale="laptop"):
    """Yields a run for each size of each family and seed."""
    if scale == "paper":
        for model in LARGE:
            name = model.replace("/", "_")
            pretrain = f"configs/pretrain.py:{model},jft,fewshot,records:shards/jft"
            yield {"name": name, "config": pretrain}
            tune = f"configs/finetune.py:{model},imagenet"
            yield {"name": f"{name}_imagenet", "config": tune, "init_from": f"@{name}"}
        return
    sizes = WIDER if scale == "gpu" else SIZES
    axes = {"seed": range(3 if scale == "gpu" else 6), "family": sizes, "size": range(3)}
    more = {"total_examples": 40_000}  # fewer than there are: each once
    if scale == "smoke":
        axes |= {"seed": [0], "family": ["hybrid"], "size": [0]}
        more = {"total_examples": 64}
    elif scale == "pilot":
        axes |= {"seed": [100], "family": ["vit", "hybrid"], "size": [2], "of_rate": (1, 0.5)}
    elif scale == "gpu":
        more = {"total_examples": 480_000, "batch_size": 128, "precision": "bfloat16"}
    for seed, family, size, *of_rate in (point.values() for point in product(axes)):
        rate = RATES[family][0] * of_rate[0] if of_rate else RATES[family][size]
        rate /= 2 if scale == "gpu" else 1
        yield {
            "name": f"{family}_{size}_{seed}" + (f"_{rate:g}" if of_rate else ""),
            "config": f"configs/evidence.py:garments,{family}",
            **sizes[family][size],
            "seed": seed,
            "optim.lr": rate,
            **more,
        }
