"""Figure 9: a class token, or the mean of the patches, each with several learning rates.

`gpu` is a longer training of a larger model, reckoned to take one H100 8 minutes with --jobs=3;
nobody has measured it.
"""

from vit_jax.launch.sweep import product

config = "configs/evidence.py:garments"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
BEST, MORE = (2e-3,), range(6, 16)  # both poolings' best rate, and more seeds of it
PAPER = {"config": "configs/pretrain.py:B/16,jft,fewshot,records:shards/jft"}
# 64 patches in place of 16, 2.7 million parameters, eleven epochs.
GPU = {
    "model.patch_size": (4, 4),
    "model.width": 192,
    "model.depth": 6,
    "model.mlp_dim": 768,
    "precision": "bfloat16",
    "batch_size": 256,
    "total_examples": 600_000,
}
SCALES = {
    "smoke": (RATES[1:2], [0], {"total_examples": 64}),
    "laptop": (RATES, range(6), {"total_examples": 24_000}),
    "gpu": (RATES, [0, 1, 2], GPU),
    "paper": ((3e-4, 8e-4), [0], PAPER),
}


def sweep(scale="laptop"):
    """Yields both poolings with each learning rate and seed; the first seed comes first."""
    rates, seeds, common = SCALES[scale]
    more = [(MORE, BEST)] if scale == "laptop" else []
    for each, tried in ((seeds, rates), *more):
        for point in product({"seed": each, "optim.lr": tried, "model.pool": ["token", "gap"]}):
            yield point | common
