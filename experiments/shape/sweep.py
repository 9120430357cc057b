"""Figure 8, appendix D.2: one ViT, made deeper, wider, with a larger MLP, with smaller patches."""

from vit_jax.launch.sweep import product

config = "configs/evidence.py"
# Everything is doubled and halved; the middle one is the base that all axes share.
BASE = {"model.depth": 4, "model.width": 64, "model.mlp_dim": 128, "model.patch_size": (6, 6)}
AXES = {
    "depth": [{"model.depth": depth} for depth in (1, 2, 4, 8)],
    "width": [{"model.width": width} for width in (32, 64, 128)],
    "mlp": [{"model.mlp_dim": mlp} for mlp in (64, 128, 256)],
    "patch": [{"model.patch_size": (side, side)} for side in (12, 6, 4)],
    "all": [
        {"model.depth": 2, "model.width": 32, "model.mlp_dim": 64},
        {},
        {"model.depth": 6, "model.width": 96, "model.mlp_dim": 192},
    ],
}
# The paper's: from 8 layers, width 1024, MLP 2048, patches of 32.
LARGE = {"model.depth": 8, "model.width": 1024, "model.mlp_dim": 2048, "model.num_heads": 16}
LARGE_AXES = {
    "depth": [{"model.depth": depth} for depth in (2, 4, 8, 16, 32, 64)],
    "width": [{"model.width": width} for width in (256, 512, 1024, 2048)],
    "mlp": [{"model.mlp_dim": mlp} for mlp in (512, 1024, 2048, 4096, 8192)],
    "patch": [{"model.patch_size": (side, side)} for side in (56, 32, 16)],
    "all": [
        {"model.depth": 4, "model.width": 512, "model.mlp_dim": 1024},
        {"model.depth": 12, "model.width": 1536, "model.mlp_dim": 3072},
    ],
}
PRETRAIN = "configs/pretrain.py:B/32,jft,fewshot,records:shards/jft"
SCALES = ("smoke", "laptop", "paper")


def sweep(scale="laptop"):
    """Yields each shape once, whichever axes it is on, with each seed; the name says its shape."""
    base, axes, seeds, common = BASE, AXES, [0, 1], {"optim.lr": 1e-3}
    if scale == "paper":
        base, axes, seeds = LARGE | {"model.patch_size": (32, 32)}, LARGE_AXES, [0]
        common = {"config": PRETRAIN}
    if scale == "smoke":
        axes, seeds, common = {"patch": AXES["patch"][:1]}, [0], {"total_examples": 64}
    shapes = {tuple((base | change).items()) for changes in axes.values() for change in changes}
    for shape, seed in (
        (shape, point["seed"]) for shape in sorted(shapes) for point in product({"seed": seeds})
    ):
        fields = dict(shape)
        sides = (fields["model.depth"], fields["model.width"], fields["model.mlp_dim"])
        name = "_".join(map(str, (*sides, fields["model.patch_size"][0], seed)))
        yield {"name": name, **fields, "seed": seed, **common}
