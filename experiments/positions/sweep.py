"""Table 8: none, learned 1D and 2D, sine-cosine, relative; at the input, in every layer, shared.

And rotary, as it is and as DINOv3 trains it. `gpu` is a longer training of a larger model, reckoned
to take one H100 8 minutes with --jobs=3, a good part of it compiling; nobody has measured it.
"""

from vit_jax.launch.sweep import product

config = "configs/evidence.py:garments"
# What and where, in the order of Table 8; `learned2d_added`, `sincos2d` and `rope` are not in it.
POSITIONS = (
    ("none", "input"),
    ("learned", "input"),
    ("learned", "layers"),
    ("learned", "layers_shared"),
    ("learned2d", "input"),
    ("learned2d", "layers"),
    ("learned2d", "layers_shared"),
    ("relative", "input"),
    ("learned2d_added", "input"),
    ("sincos2d", "input"),
    ("rope", "input"),
    ("rope_rescaled", "input"),
)
RESCALED = {"model.position": "rope", "model.rotary.rescale": 2.0}
PAPER = {"config": "configs/pretrain.py:B/16,jft,fewshot,records:shards/jft"}
# 64 patches in place of 16, 2.7 million parameters, seven epochs.
GPU = {
    "model.patch_size": (4, 4),
    "model.width": 192,
    "model.depth": 6,
    "model.mlp_dim": 768,
    "precision": "bfloat16",
    "batch_size": 256,
    "total_examples": 400_000,
    "optim.lr": 1e-3,
}
SCALES = {
    "smoke": (POSITIONS[-1:], [0], {"total_examples": 64}),
    "laptop": (POSITIONS, [0, 1, 2, 3, 4], {"total_examples": 40_000, "optim.lr": 1e-3}),
    "gpu": (POSITIONS, [0, 1, 2], GPU),
    "paper": (POSITIONS, [0], PAPER),
}


def sweep(scale="laptop"):
    """Yields each position embedding with each seed; the first seed of all comes first."""
    positions, seeds, common = SCALES[scale]
    for point in product({"seed": seeds, "kind": positions}):
        (what, where), seed = point["kind"], point["seed"]
        position = {"model.position": what, "model.position_at": where}
        position |= RESCALED if what == "rope_rescaled" else {}
        yield {"name": f"{what}_{where}_{seed}", **position, "seed": seed, **common}
