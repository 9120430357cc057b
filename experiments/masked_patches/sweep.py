"""Section 4.6: pre-training by masked patches with three targets, by labels, and none at all.

`gpu` is a wider model that sees four times as many images: a guess of what 8 minutes of one H100
are enough for, not measured.
"""

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
RATES = {"": 4e-3, "scratch": 2e-3}  # of fine-tuning, from experiments/transfer
WIDE = {"model.width": 256, "model.depth": 6, "model.mlp_dim": 512}
SCALES = ("smoke", "laptop", "gpu", "paper")


def sweep(scale="laptop"):
    """Yields the pre-training runs, and behind each the fine-tuning run that starts from it."""
    if scale == "paper":
        for target, pretrain in LARGE.items():
            yield {"name": target, "config": pretrain}
            tune = {"config": "configs/finetune.py:B/16,imagenet", "init_from": f"@{target}"}
            yield {"name": f"{target}_imagenet", **tune}
        yield {"name": "scratch_imagenet", "config": "configs/pretrain.py:B/16,imagenet"}
        return
    targets, seeds, before, after, wide = TARGETS, range(6), {}, {}, {}
    if scale == "smoke":
        targets, seeds = {"small": TARGETS["small"]}, [0]
        before = after = {"total_examples": 64}
    elif scale == "gpu":
        wide, seeds = WIDE, range(3)
        before = {"total_examples": 480_000, "optim.lr": 1e-3}
    for seed in seeds:
        for target, objective in targets.items():
            name, family = f"{target}_{seed}", ",vit"
            own = {"optim.lr": RATES["scratch"], **wide}
            if objective is not None:
                pretrain = {"name": name, "config": "configs/evidence.py:garments", "seed": seed}
                yield pretrain | objective | wide | before
                family, own = "", {"optim.lr": RATES[""], "init_from": f"@{name}"}
            tune = {"name": f"{name}_digits", "config": f"configs/evidence.py:few_digits{family}"}
            yield tune | {"seed": seed} | own | after
