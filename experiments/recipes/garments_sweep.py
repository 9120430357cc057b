"""Fashion-MNIST with pre-training on fractals and without, of few images: three seeds.

    python experiments/packages.py fashion_mnist
    vit-jax sweep experiments/recipes/garments_sweep.py --workdir=runs/garments --jobs=2
    vit-jax report runs/garments

The recipe `configs/garments.py`, much shorter: 20,000 fractals, then 15,000 garments; and 15,000
garments from scratch.
"""

config = "configs/garments.py"


def sweep():
    """Yields, for each seed, what is pre-trained, what follows from it, and one from scratch."""
    for seed in range(3):
        before = {"config": "configs/garments.py:fractals", "total_examples": 20_000}
        few = {"total_epochs": None, "total_examples": 15_000}
        yield {"name": f"fractals_{seed}", "seed": seed, **before}
        yield {"name": f"scratch_{seed}", "seed": seed, **few}
        start = f"@fractals_{seed}"
        yield {"name": f"pretrained_{seed}", "init_from": start, "seed": seed, **few}
