"""Figures 3 and 4: training on more and more garments, of a ViT, a ResNet and a hybrid.

`pilot` is where RATES are from: 15,000 garments, a seed of its own, the best of val. `gpu` is wider
models, half the rates and eight times as long, on the fewest and the most garments: a guess of what
8 minutes of one H100 are enough for, not measured.
"""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
RATES = {"vit": 2e-3, "resnet": 8e-3, "hybrid": 2e-3}
TRIED = {
    "vit": (1e-3, 2e-3, 4e-3),
    "resnet": (4e-3, 8e-3, 1.6e-2),
    "hybrid": (1e-3, 2e-3, 4e-3, 8e-3),
}
# Each a part of the next, chosen by a hash of an image's number: about 600, 3,000, ... of them.
IMAGES = {600: "train[:1%]", 3000: "train[:5%]", 15_000: "train[:25%]", 54_000: "train[:90%]"}
WIDER = {
    "vit": {"model.width": 256, "model.mlp_dim": 512, "model.depth": 6},
    "resnet": {"model.resnet": (2, 2), "model.resnet_width": 64},
}
WIDER["hybrid"] = WIDER["vit"] | {"model.resnet_width": 64}
# At the paper's scale: JFT-300M and random parts of it (Figure 4), B/32, R50x1 and their hybrid.
JFT = {"9M": "train[:3%]", "30M": "train[:10%]", "90M": "train[:30%]", "300M": "train[:99%]"}
LARGE = ("B/32", "R50x1", "R50+B/32")
SCALES = ("smoke", "pilot", "laptop", "gpu", "paper")


def sweep(scale="laptop"):
    """Yields a run for each family, number of images and seed; the paper's are then fine-tuned."""
    if scale == "paper":
        for point in product({"model": LARGE, "images": JFT}):
            name = f"{point['model'].replace('/', '_')}_{point['images']}"
            source = "jft,fewshot,records:shards/jft"
            pretrain = f"configs/pretrain.py:{point['model']},{source}"
            yield {"name": name, "config": pretrain, "data.train.split": JFT[point["images"]]}
            tune = f"configs/finetune.py:{point['model']},imagenet"
            yield {"name": f"{name}_imagenet", "config": tune, "init_from": f"@{name}"}
        return
    if scale == "pilot":
        for family, rates in TRIED.items():
            for rate in rates:
                yield _point(family, 15_000, 100, f"_{rate:g}", **{"optim.lr": rate})
        return
    axes = {"seed": range(3), "family": RATES, "images": IMAGES}
    if scale == "smoke":
        axes = {"seed": [0], "family": ["resnet"], "images": [600]}
    elif scale == "gpu":
        axes["images"] = [600, 54_000]
    for seed, family, images in (point.values() for point in product(axes)):
        more = {"total_examples": 64} if scale == "smoke" else {}
        if scale == "gpu":
            more = WIDER[family] | {"optim.lr": RATES[family] / 2, "batch_size": 128}
            more |= {"total_examples": 480_000, "precision": "bfloat16"}
        yield _point(family, images, seed, **more)


def _point(family, images, seed, ending="", **more):
    return {
        "name": f"{family}_{images}_{seed}{ending}",
        "config": f"configs/evidence.py:garments,{family}",
        "data.train.split": IMAGES[images],
        "seed": seed,
        "optim.lr": RATES[family],
        "total_examples": 60_000,
        **more,
    }
