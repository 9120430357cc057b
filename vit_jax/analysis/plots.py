"""Pictures; matplotlib comes with the `plot` extra."""

import os
from pathlib import Path

from vit_jax.training.metrics import read_metrics


def curves(workdir: str | os.PathLike) -> Path | None:
    """Draws a run's loss and accuracy into WORKDIR/curves.png; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read_metrics(workdir)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "val", "test"):
            points = [(x["step"], x[f"{split}/{name}"]) for x in lines if f"{split}/{name}" in x]
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=split)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(str(workdir), fontsize=9)
    path = Path(workdir) / "curves.png"
    figure.savefig(path, dpi=110)
    return path
