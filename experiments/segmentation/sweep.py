"""What patches know of objects: ViTs trained by labels and by masked patches, then frozen."""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
OBJECTIVES = {"labels": {}, "masked": {"objective": "masked_colour"}}
LARGE = {
    "labels": "configs/pretrain.py:B/16,imagenet21k",
    "masked": "configs/masked.py:B/16,imagenet21k",
}
SCALES = ("smoke", "laptop", "paper")


def sweep(scale="laptop"):
    """Yields the pre-training runs; what is measured of them is in report.py."""
    if scale == "paper":
        for name, pretrain in LARGE.items():
            yield {"name": f"{name}_0", "config": pretrain}
        return
    axes, smoke = {"name": OBJECTIVES, "seed": [0, 1]}, {}
    if scale == "smoke":
        axes, smoke = {"name": ["labels"], "seed": [0]}, {"total_examples": 64}
    for point in product(axes):
        name, seed = point.values()
        fields = {"model.patch_size": (4, 4), "seed": seed}
        yield {"name": f"{name}_{seed}", **fields, **OBJECTIVES[name], **smoke}
