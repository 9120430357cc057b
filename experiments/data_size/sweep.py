"""Figures 3 and 4: pre-training on more and more images, of a ViT, a ResNet and a hybrid."""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
FAMILIES = ("vit", "resnet", "hybrid")
SIZES = (500, 2000, 8000)
# At the paper's scale: JFT-300M and random parts of it (Figure 4), B/32, R50x1 and their hybrid.
JFT = {"9M": "train[:3%]", "30M": "train[:10%]", "90M": "train[:30%]", "300M": "train[:99%]"}
LARGE = ("B/32", "R50x1", "R50+B/32")
SCALES = ("smoke", "laptop", "paper")


def sweep(scale="laptop"):
    """Yields the pre-training runs, and behind each the fine-tuning run that starts from it."""
    if scale == "paper":
        for point in product({"model": LARGE, "images": JFT}):
            name = f"{point['model'].replace('/', '_')}_{point['images']}"
            source = "jft,fewshot,records:shards/jft"
            pretrain = f"configs/pretrain.py:{point['model']},{source}"
            yield {"name": name, "config": pretrain, "data.train.split": JFT[point["images"]]}
            tune = f"configs/finetune.py:{point['model']},imagenet"
            yield {"name": f"{name}_imagenet", "config": tune, "init_from": f"@{name}"}
        return
    axes = {"family": FAMILIES, "images": SIZES, "seed": [0, 1]}
    smoke = {}
    if scale == "smoke":
        axes, smoke = {"family": ["resnet"], "images": [500], "seed": [0]}, {"total_examples": 64}
    for point in product(axes):
        family, images, seed = point.values()
        name = f"{family}_{images}_{seed}"
        yield {
            "name": name,
            "config": f"configs/evidence.py:fractals,{family}",
            "data.train.split": f"train{images}",
            "seed": seed,
            **smoke,
        }
        yield {
            "name": f"{name}_digits",
            "config": "configs/evidence.py:digits",
            "init_from": f"@{name}",
            "seed": seed,
            **smoke,
        }
