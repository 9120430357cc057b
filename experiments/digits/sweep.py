"""What `make train` runs, with three seeds: digits at 8x8 pixels, and fine-tuned at 16x16."""

config = "configs/digits.py"


def sweep():
    """Yields a run at 8x8 pixels and one at 16x16 that starts from it, for each seed."""
    for seed in (0, 1, 2):
        yield {"name": f"seed{seed}", "seed": seed}
        yield {
            "name": f"seed{seed}_16x16",
            "config": "configs/digits.py:finetune",
            "init_from": f"@seed{seed}",
            "model.head": "fresh",  # as in the paper, B.1.1
            "seed": seed,
        }
