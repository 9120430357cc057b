"""The paper (appendix D.3, Figure 9) first found global average pooling to be far worse than a
class token, and then that this was neither the extra token nor the pooling, but the learning
rate: with 3e-4 in place of 8e-4 the mean of the patches does as well. It is a plot without
numbers.

Here both read a ViT of 4 layers, trained on 24,000 photographs of Fashion-MNIST, each once (750
steps; `configs/evidence.py`), with four learning rates and six seeds, and with ten more seeds at
the rate that was the best of both, as six (and three before) left it undecided; so would the ten
alone: -0.71% (-0.96% to -0.45%). Each has its best rate by the mean accuracy on held-out training
images (val); what is compared is the accuracy on the 10,000 of the test split.

The rule, written before the runs. Differences are paired by seed, and have 95% intervals by
Student's t. Both are as good if the interval of their difference, each at its best rate, is within
±0.5%; they are not if all of it is outside. The rate is what matters if the mean of the patches is
worse by 0.5% or more, and the interval above 0, at the class token's best rate than at its own; it
is not if the interval is below 0.5%, or both have the same best rate. Anything else is undecided.
"""

from reporting import Difference, Told, by_seed, figure, less, means, table

TITLE = "Class token or global average pooling"
CLAIM = "Figure 9: both are as good, each with its own learning rate"
DATA = ("fashion_mnist", "mnist")  # of experiments/packages.py
LEAST = 0.005
NAMES = {"token": "class token", "gap": "mean of patches"}
COLOURS = {"token": "#1f4e79", "gap": "#c55a11"}


def key(point):
    """The pooling and the learning rate."""
    return point.overrides["model.pool"], point.overrides["optim.lr"]


def tell(points):
    """Are they alike, each at its best rate, and is it the rate that the mean needs?"""
    val, test = means(points, key, "val/accuracy"), means(points, key, "test/accuracy")
    seen = by_seed(points, key, "test/accuracy")
    rates = sorted({rate for _, rate in test})
    best = {pool: max(rates, key=lambda rate: val[pool, rate].mean) for pool in NAMES}
    token, gap = ((pool, best[pool]) for pool in NAMES)
    apart = less(seen[gap], seen[token])
    alike = apart.within(LEAST)
    crossed: Difference = less(seen[gap], seen["gap", best["token"]])
    rate = "no" if best["gap"] == best["token"] else crossed.decides(LEAST)
    told = f"class token {test[token]} at {token[1]:g}, mean of patches {test[gap]} at {gap[1]:g}"
    verdict = f"Each at its best rate by val: {told}; mean less token {apart}. As good, within "
    verdict += f"±0.5%: {alike}. "
    if best["gap"] == best["token"]:
        verdict += "The best rate is the same one. The rate is what matters: no."
    else:
        verdict += f"What the mean gains by its own rate, against the token's: {crossed}. "
        verdict += f"The rate is what matters: {rate}."
    header = ("learning rate",)
    header += tuple(f"{name}, {split}" for name in NAMES.values() for split in ("val", "test"))
    rows = [
        (f"{rate:g}", *(split[pool, rate] for pool in NAMES for split in (val, test)))
        for rate in rates
    ]
    return Told(
        table(header, rows),
        verdict,
        f"{told}; difference {apart}",
        alike if alike == rate else f"as good: {alike}; by the rate: {rate}",
        drawn(test, rates, best),
    )


def drawn(test, rates, best):
    """Test accuracy at each rate, and which rate val has chosen."""
    drawing, axes = figure(6.8, 4.2)
    for pool, name in NAMES.items():
        shift = 0.985 if pool == "token" else 1.015  # so that bars do not overlap
        found = [test[pool, rate] for rate in rates]
        axes.errorbar(
            [rate * shift for rate in rates],
            [100 * each.mean for each in found],
            [100 * each.std for each in found],
            color=COLOURS[pool],
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
        axes.plot(
            best[pool] * shift,
            100 * test[pool, best[pool]].mean,
            "o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor=COLOURS[pool],
            label="best rate, on held-out images" if pool == "gap" else None,
        )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    counts = sorted({len(each.values) for each in test.values()})
    seeds = " or ".join(map(str, counts))
    axes.set(xlabel="learning rate", ylabel=f"test accuracy, garments (%), ± std of {seeds} seeds")
    axes.set_title("What the head reads: a class token, or the mean of the patches", fontsize=11)
    axes.legend(fontsize=8)
    return drawing
