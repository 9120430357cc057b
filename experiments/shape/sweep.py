"""Figure 8, appendix D.2: one ViT, made deeper, wider, with a larger MLP, with smaller patches.

`gpu` is a longer training of larger models, reckoned to take one H100 8 minutes with --jobs=3;
nobody has measured it.
"""

from vit_jax.launch.sweep import product

config = "configs/evidence.py:garments"
SIDES = ("model.depth", "model.width", "model.mlp_dim", "model.patch_size")


def doubled_and_halved(depth, width, mlp, patch):
    """Each axis of a base, from cheap to expensive: half, base and double; half a patch costs more.

    Of `all`, patches stay, and the largest is 1.5 times the base, which costs about as much as the
    ends of the other axes.
    """
    base = dict(zip(SIDES, (depth, width, mlp, patch), strict=True))
    axes = {side: [base | {side: base[side] * k // 2} for k in (1, 2, 4)] for side in SIDES[:3]}
    axes["model.patch_size"] = [base | {"model.patch_size": patch * 2 // k} for k in (1, 2, 4)]
    axes["all"] = [base | {side: base[side] * k // 2 for side in SIDES[:3]} for k in (1, 2, 3)]
    return axes


def of_the_paper():
    """The paper's axes, from 8 layers, width 1024, MLP 2048, patches of 32."""
    sizes = {
        "model.depth": (2, 4, 8, 16, 32, 64),
        "model.width": (256, 512, 1024, 2048),
        "model.mlp_dim": (512, 1024, 2048, 4096, 8192),
        "model.patch_size": (56, 32, 16),
    }
    base = dict(zip(SIDES, (8, 1024, 2048, 32), strict=True))
    axes = {side: [base | {side: size} for size in sizes[side]] for side in SIDES}
    together = ((4, 512, 1024, 32), (12, 1536, 3072, 32))
    axes["all"] = [dict(zip(SIDES, each, strict=True)) for each in together]
    return axes


GPU = {
    "precision": "bfloat16",
    "batch_size": 256,
    "total_examples": 400_000,
    "optim.lr": 1e-3,
}
PAPER = {
    "config": "configs/pretrain.py:B/32,jft,fewshot,records:shards/jft",
    "model.num_heads": 16,
}
LAPTOP = doubled_and_halved(4, 64, 128, 8)
SCALES = {
    "smoke": ({"patch": LAPTOP["model.patch_size"][:1]}, [0], {"total_examples": 64}),
    "laptop": (LAPTOP, range(7), {"total_examples": 24_000, "optim.lr": 2e-3}),
    "gpu": (doubled_and_halved(6, 192, 384, 8), [0, 1, 2], GPU),
    "paper": (of_the_paper(), [0], PAPER),
}


def sweep(scale="laptop"):
    """Yields each shape once, whichever axes it is on, with each seed; the name says its shape."""
    axes, seeds, common = SCALES[scale]
    shapes = {tuple(shape.values()) for shapes in axes.values() for shape in shapes}
    for point in product({"seed": seeds, "shape": sorted(shapes)}):
        shape, seed = point["shape"], point["seed"]
        fields = dict(zip(SIDES, (*shape[:3], (shape[3], shape[3])), strict=True))
        name = "_".join(map(str, (*shape, seed)))
        yield {"name": name, **fields, "seed": seed, **common}
