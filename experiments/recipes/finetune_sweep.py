"""The paper's learning rates for fine-tuning, compared on the development splits (Table 4).

Each point trains on all but the development split of its data set; with the best learning rate of
a data set, and without `dev`, then follows the run to report.
"""

config = "configs/finetune.py:B/16,cifar100,dev"
# Small data sets have the same rates.
SMALL = (0.001, 0.003, 0.01, 0.03)
LEARNING_RATES = {"imagenet": (0.003, 0.01, 0.03, 0.06), "cifar10": SMALL, "cifar100": SMALL}
LEARNING_RATES |= {"pets": SMALL, "flowers": SMALL}
SCALES = ("laptop", "pod")


def sweep(scale="laptop"):
    """Yields overrides of the config: on a laptop two rates of one data set, on a pod all."""
    chosen = LEARNING_RATES if scale == "pod" else {"pets": SMALL[1:3]}
    for data, rates in chosen.items():
        for lr in rates:
            yield {
                "name": f"{data}_{lr}",
                "config": f"configs/finetune.py:B/16,{data},dev",
                "init_from": "B_16.npz",
                "optim.lr": lr,
            }
