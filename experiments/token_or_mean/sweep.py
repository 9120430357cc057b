"""Figure 9: a class token, or the mean of the patches, each with several learning rates."""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
PAPER = {"config": "configs/pretrain.py:B/16,jft,fewshot,records:shards/jft"}
SCALES = {
    "smoke": (RATES[1:2], [0], {"total_examples": 64}),
    "laptop": (RATES, [0, 1], {"total_examples": 24_000}),
    "paper": ((3e-4, 8e-4), [0], PAPER),
}


def sweep(scale="laptop"):
    """Yields both poolings with each learning rate and seed."""
    rates, seeds, common = SCALES[scale]
    for point in product({"model.pool": ["token", "gap"], "optim.lr": rates, "seed": seeds}):
        yield point | common
