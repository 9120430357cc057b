"""Section 4.6: pre-training by masked patches with three targets, by labels, and none at all."""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
TARGETS = {
    "colour": {"objective": "masked_colour"},
    "small": {"objective": "masked_small"},
    "pixels": {"objective": "masked_pixels"},
    "labels": {},
    "scratch": None,
}
# The paper's B/16 on JFT-300M: a million steps of masked patches, or Table 3's epochs of labels.
LARGE = {
    "colour": "configs/masked.py:B/16,jft,fewshot,records:shards/jft",
    "small": "configs/masked.py:B/16,jft,small,fewshot,records:shards/jft",
    "pixels": "configs/masked.py:B/16,jft,pixels,fewshot,records:shards/jft",
    "labels": "configs/pretrain.py:B/16,jft,fewshot,records:shards/jft",
}
SCALES = ("smoke", "laptop", "paper")


def sweep(scale="laptop"):
    """Yields the pre-training runs, and behind each the fine-tuning run that starts from it."""
    if scale == "paper":
        for target, pretrain in LARGE.items():
            yield {"name": target, "config": pretrain}
            tune = {"config": "configs/finetune.py:B/16,imagenet", "init_from": f"@{target}"}
            yield {"name": f"{target}_imagenet", **tune}
        yield {"name": "scratch_imagenet", "config": "configs/pretrain.py:B/16,imagenet"}
        return
    axes, smoke = {"target": TARGETS, "seed": [0, 1]}, {}
    if scale == "smoke":
        axes, smoke = {"target": ["small"], "seed": [0]}, {"total_examples": 64}
    for point in product(axes):
        target, seed = point.values()
        name, common = f"{target}_{seed}", {"seed": seed, **smoke}
        if TARGETS[target] is None:
            tune = {"config": "configs/evidence.py:digits,vit", "model.patch_size": (4, 4)}
        else:
            yield {"name": name, "model.patch_size": (4, 4), **TARGETS[target], **common}
            tune = {"config": "configs/evidence.py:digits", "init_from": f"@{name}"}
        yield {"name": f"{name}_digits", **tune, **common}
