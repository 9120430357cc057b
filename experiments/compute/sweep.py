"""Figure 5: ViTs, ResNets and hybrids of several sizes, each trained on as many images.

Each size has two learning rates, of which report.py takes the better: wider ViTs want less.
"""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"


def _vit(width, depth=4):
    return {"model.width": width, "model.depth": depth, "model.mlp_dim": 2 * width}


SIZES = {
    "vit": [_vit(32), _vit(64), _vit(128)],
    "resnet": [
        {"model.resnet": (1,)},
        {"model.resnet": (1, 1)},
        {"model.resnet": (1, 1), "model.resnet_width": 64},
    ],
    "hybrid": [_vit(32), _vit(64), _vit(128)],
}
RATES = {"": 2e-3, "_low": 7e-4}  # by the ending of a point's name
# Table 6's models on JFT-300M.
LARGE = "B/32 B/16 L/32 L/16 H/14 R50x1 R50x2 R101x1 R152x1 R152x2 R200x3 R50+B/32 R50+B/16 "
LARGE = [*(LARGE + "R50+L/32 R50+L/16").split()]
SCALES = ("smoke", "laptop", "paper")


def sweep(scale="laptop"):
    """Yields each size of each family, with two rates and two seeds."""
    if scale == "paper":
        for model in LARGE:
            name = model.replace("/", "_")
            pretrain = f"configs/pretrain.py:{model},jft,fewshot,records:shards/jft"
            yield {"name": name, "config": pretrain}
            tune = f"configs/finetune.py:{model},imagenet"
            yield {"name": f"{name}_imagenet", "config": tune, "init_from": f"@{name}"}
        return
    axes = {"family": SIZES, "size": range(3), "seed": [0, 1], "rate": RATES}
    smoke = {}
    if scale == "smoke":
        axes = {"family": ["hybrid"], "size": [0], "seed": [0], "rate": ["_low"]}
        smoke = {"total_examples": 64}
    for point in product(axes):
        family, size, seed, rate = point.values()
        yield {
            "name": f"{family}_{size}_{seed}{rate}",
            "config": f"configs/evidence.py:fractals,{family}",
            **SIZES[family][size],
            "seed": seed,
            "optim.lr": RATES[rate],
            **smoke,
        }
