"""The paper (section 4.4, Figure 5, Table 6) pre-trains ViTs, ResNets and hybrids of many sizes on
JFT-300M and holds accuracy against the FLOPs of pre-training. ViTs take two to four times less
than ResNets for the same accuracy; hybrids are a little better than ViTs where compute is small,
and as good where it is large.

Here three sizes of each family see 40,000 images of fractals (`configs/evidence.py`); the compute
is of all training steps, counted by hand from the shapes (`vit_jax/analysis/cost.py`); accuracy is
five-shot linear on 100 other classes. Of two learning rates, 2e-3 and 7e-4, each size has the one
that is better on held-out images of its own classes.
"""

import math

import numpy as np
from reporting import Mean, Told, curves, means, table

TITLE = "Accuracy for compute"
CLAIM = (
    "Figure 5: a ViT is 2 to 4 times cheaper than a ResNet of the same accuracy; hybrids win when "
    "small"
)
FAMILIES = {"vit": "ViT", "resnet": "ResNet", "hybrid": "hybrid"}


def tell(points):
    """How much more compute a ResNet takes than a ViT of the same accuracy, and who wins small."""

    def key(point):
        family, size, *_ = point.name.split("_")
        return family, int(size)

    def rate(point):
        return point.overrides.get("optim.lr", 0)

    tried = means(points, lambda point: (key(point), rate(point)), "val/accuracy")
    best: dict = {}
    for size, lr in sorted(tried, key=lambda each: tried[each].mean):
        best[size] = lr
    points = [point for point in points if rate(point) == best[key(point)]]
    few, val = means(points, key), means(points, key, "val/accuracy")
    cost, sizes = means(points, key, "gflops"), means(points, key, "parameters")
    lines = {
        FAMILIES[family]: {cost[each].mean: few[each] for each in few if each[0] == family}
        for family in FAMILIES
        if any(each[0] == family for each in few)
    }
    lines = {name: dict(sorted(values.items())) for name, values in lines.items()}
    rows = [
        (
            FAMILIES[each[0]],
            f"{1000 * sizes[each].mean:,.0f} k",
            f"{cost[each].mean:,.0f}",
            f"{best[each]:g}",
            few[each],
            val[each],
        )
        for each in sorted(few, key=lambda each: (each[0], cost[each].mean))
    ]
    drawn = curves(lines, "training compute (GFLOP)", "5-shot accuracy, other fractals")
    header = ("family", "parameters", "GFLOP in training", "learning rate", "5-shot", "val")
    if len(lines) < 3:
        return Told(table(header, rows), "", "", "", drawn)

    ratio, at = cheaper(lines["ViT"], lines["ResNet"])
    small = {name: next(iter(values.items())) for name, values in lines.items()}
    budget = max(flops for flops, _ in small.values())
    at_small = {name: accuracy_at(values, budget) for name, values in lines.items()}
    others = [value for name, value in at_small.items() if name != "hybrid"]
    wins = all(at_small["hybrid"].beats(value) for value in others)
    if ratio is None:
        cost_verdict = "the two families reach no common accuracy"
    elif ratio > 1:
        cost_verdict = f"a ResNet takes {ratio:.1f} times the compute of a ViT"
    else:
        cost_verdict = f"a ViT takes {1 / ratio:.1f} times the compute of a ResNet"
    at = (
        ""
        if ratio is None
        else f" for the same accuracy ({at:.1%}, halfway of what both means reach)"
    )
    cheap = ratio is not None and ratio > 1.2
    seen = {True: "is seen here", False: "is not seen here"}
    told = ", ".join(f"{name} {value}" for name, value in at_small.items())
    verdict = (
        f"That a ViT is cheaper than a ResNet at equal accuracy {seen[cheap]}: {cost_verdict}{at}. "
        f"That hybrids win when small {seen[wins]}: at {budget:,.0f} GFLOP, the smallest budget "
        f"that all three have, {told}. Between points the curves are taken to be straight in the "
        "logarithm of the compute."
    )
    agrees = "yes" if cheap and wins else "no"
    if cheap != wins:
        agrees = "the first half" if cheap else "the second half"
    short = f"{cost_verdict}; at {budget:,.0f} GFLOP {told}"
    return Told(table(header, rows), verdict, short, agrees, drawn)


def accuracy_at(line, flops):
    """A line's accuracy at some compute, seed by seed, straight between points, flat beyond."""
    xs = [math.log(x) for x in line]
    seeds = zip(*(each.values for each in line.values()), strict=False)
    return Mean(tuple(float(np.interp(math.log(flops), xs, ys)) for ys in seeds))


def cheaper(ours, theirs):
    """(their compute / ours, accuracy) at the middle of the accuracies that both lines reach."""
    both = []
    for line in (ours, theirs):
        ys = np.maximum.accumulate([each.mean for each in line.values()])
        first = np.diff(ys, prepend=-1) > 0  # where a height is reached, not where it is left
        both.append((np.log(list(line))[first], ys[first]))
    low = max(ys[0] for _, ys in both)
    high = min(ys[-1] for _, ys in both)
    if high < low:
        return None, None
    at = (low + high) / 2
    # The least compute that reaches it.
    costs = [float(np.exp(np.interp(at, ys, xs))) for xs, ys in both]
    return costs[1] / costs[0], at
