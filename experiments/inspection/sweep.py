"""One small ViT of fine patches, beside the published weights; at the paper's scale its L/16."""

config = "configs/evidence.py:garments,vit"
FINE = {"model.patch_size": (4, 4), "model.depth": 6}
SCALES = {
    "smoke": {"model.depth": 2, "total_examples": 64},
    "laptop": FINE,
    "paper": {"config": "configs/pretrain.py:L/16,imagenet21k"},
}


def sweep(scale="laptop"):
    """Yields the run whose weights are drawn."""
    yield {"name": "vit", **SCALES[scale]}
