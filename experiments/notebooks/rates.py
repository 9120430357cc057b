"""Three learning rates of the digits model, two seeds each: what train_and_compare.ipynb compares.

python -m vit_jax sweep experiments/notebooks/rates.py --workdir=runs/rates
"""

from vit_jax.launch.sweep import product

config = "configs/digits.py"
# Steps, learning rates, seeds.
SCALES = {"smoke": (2, [3e-3, 3e-2], [0]), "laptop": (240, [3e-4, 3e-3, 3e-2], [0, 1])}


def sweep(scale="laptop"):
    """Yields every rate with every seed."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: expected one of {', '.join(SCALES)}")
    steps, rates, seeds = SCALES[scale]
    for point in product({"optim.lr": rates, "seed": seeds}):
        name = f"lr{point['optim.lr']:g}_seed{point['seed']}"
        every = {"log.every": max(steps // 24, 1), "eval.every": max(steps // 6, 1)}
        yield {"name": name, "total_steps": steps, "log.tensorboard": False, **every, **point}
