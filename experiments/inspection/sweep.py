"""One ViT of fine patches, to be looked into; at the paper's scale any published one."""

config = "configs/evidence.py"
LAPTOP = {"model.patch_size": (3, 3), "model.depth": 6, "total_examples": 60_000}
SCALES = {
    "smoke": {"model.patch_size": (6, 6), "model.depth": 2, "total_examples": 64},
    "laptop": LAPTOP,
    "paper": {"config": "configs/pretrain.py:L/16,imagenet21k"},
}


def sweep(scale="laptop"):
    """Yields the run whose weights are drawn."""
    yield {"name": "vit", **SCALES[scale]}
