"""Figures 3 and 4: pre-training on more and more images, of a ViT, a ResNet and a hybrid."""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
FAMILIES = ("vit", "resnet", "hybrid")
SHARES = {600: "train[:1%]", 3600: "train[:6%]", 15_000: "train[:25%]", 54_000: "train[:90%]"}
SEEDS = (0, 1, 2, 3)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of the pilot, which decided BEST on `val`
BEST = {"vit": 2e-3, "resnet": 2e-3, "hybrid": 2e-3}
# At the paper's scale: JFT-300M and random parts of it (Figure 4), B/32, R50x1 and their hybrid.
JFT = {"9M": "train[:3%]", "30M": "train[:10%]", "90M": "train[:30%]", "300M": "train[:99%]"}
LARGE = ("B/32", "R50x1", "R50+B/32")
SCALES = ("smoke", "pilot", "laptop", "paper")


def sweep(scale="laptop"):
    """Yields each family with each number of images and seed; `pilot` with each learning rate."""
    if scale == "paper":
        for point in product({"model": LARGE, "images": JFT}):
            name = f"{point['model'].replace('/', '_')}_{point['images']}"
            source = "jft,fewshot,records:shards/jft"
            pretrain = f"configs/pretrain.py:{point['model']},{source}"
            yield {"name": name, "config": pretrain, "data.train.split": JFT[point["images"]]}
            tune = f"configs/finetune.py:{point['model']},imagenet"
            yield {"name": f"{name}_imagenet", "config": tune, "init_from": f"@{name}"}
        return
    axes = {"family": FAMILIES, "images": SHARES, "rate": [None], "seed": SEEDS}
    if scale == "pilot":
        axes |= {"images": [15_000], "rate": RATES, "seed": [0]}
    if scale == "smoke":
        axes |= {"family": ["resnet"], "images": [600], "seed": [0]}
    for point in product(axes):
        family, images, rate, seed = point.values()
        yield {
            "name": f"{family}_{images}_{seed}" + (f"_{rate:g}" if rate else ""),
            "config": f"configs/evidence.py:garments,{family}",
            "data.train.split": SHARES[images],
            "optim.lr": rate or BEST[family],
            "seed": seed,
            **({"total_examples": 64} if scale == "smoke" else {}),
        }
