"""Table 8: none, learned 1D and 2D, sine-cosine, relative; at the input, in every layer, shared.

And rotary, as it is and as DINOv3 trains it.
"""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
# What and where, in the order of Table 8; `learned2d_added`, `sincos2d` and `rope` are not in it.
POSITIONS = (
    ("none", "input"),
    ("learned", "input"),
    ("learned", "layers"),
    ("learned", "layers_shared"),
    ("learned2d", "input"),
    ("learned2d", "layers"),
    ("learned2d", "layers_shared"),
    ("learned2d_added", "input"),
    ("sincos2d", "input"),
    ("relative", "input"),
    ("rope", "input"),
    ("rope_rescaled", "input"),
)
RESCALED = {"model.position": "rope", "model.rotary.rescale": 2.0}
PAPER = {"config": "configs/pretrain.py:B/16,jft,fewshot,records:shards/jft"}
SCALES = {
    "smoke": (POSITIONS[-1:], [0], {"total_examples": 64}),
    "laptop": (POSITIONS, [0, 1, 2], {}),
    "paper": (POSITIONS, [0], PAPER),
}


def sweep(scale="laptop"):
    """Yields each position embedding with each seed."""
    positions, seeds, common = SCALES[scale]
    for what, where in positions:
        for seed in product({"seed": seeds}):
            position = {"model.position": what, "model.position_at": where}
            position |= RESCALED if what == "rope_rescaled" else {}
            yield {"name": f"{what}_{where}_{seed['seed']}", **position, **seed, **common}
