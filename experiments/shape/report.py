"""The paper (appendix D.2, Figure 8) changes one side of a ViT's shape at a time, from 8 layers,
width 1024, MLP 2048 and patches of 32. Depth helps most (less and less from 16 layers on), width
least; smaller patches help without any more parameters; and making all of them larger together
helps. It is a plot without numbers.

Here the base is 4 layers, width 64, MLP 128 and patches of 8 pixels (`configs/evidence.py`), each
side is halved and doubled, and all are trained on 24,000 photographs of Fashion-MNIST, each once
(750 steps), with one learning rate, 0.002, the best of the base in `token_or_mean`, and with seven
seeds: three at first, whose spread asked for four more. The rate was not tuned for the other
shapes, and wide ViTs want a lower one ([Accuracy for compute](../compute/README.md)): what is lost
at an expensive end is in part the rate's. They are measured by their accuracy on the 10,000 of the
test split.

The rule, written before the runs. What an axis gains is the accuracy at its expensive end, with
double the base (of all sides together, 1.5 times), less that at its cheap one, with half. Gains and
their differences are paired by seed, and have 95% intervals by Student's t. A difference is there
if its mean is 0.5% or more and the interval above 0; it is not if the interval is below 0.5%;
anything else is undecided. Depth helps most if it gains more than each other side; width least if
each other side gains more; smaller patches help if patches of 8 are better than of 16, and of 4
than of 8; all together help if they gain.
"""

import statistics

from reporting import Difference, Told, by_seed, every, figure, less, means, table

TITLE = "Depth, width, MLP, patches"
CLAIM = "Figure 8: depth helps most and width least; smaller patches help without more parameters"
DATA = ("fashion_mnist", "mnist")  # of experiments/packages.py
LEAST = 0.005
NAMES = {"depth": "depth", "width": "width", "mlp": "MLP", "patch": "patch size", "all": "all"}
SIDES = ("depth", "width", "mlp", "patch")


def shape_of(point):
    """Depth, width, MLP and patch size, of the point's name."""
    return tuple(int(part) for part in point.name.split("_")[:4])


def axes_of(shapes, cost):
    """The shapes of each axis, from cheap to expensive; the base is on all of them."""
    # Most shapes differ from the base on one side alone.
    base = tuple(statistics.mode(side) for side in zip(*shapes, strict=True))
    axes = {name: [base] for name in NAMES}
    for shape in shapes:
        changed = [side for side, a, b in zip(SIDES, shape, base, strict=True) if a != b]
        if changed:
            axes[changed[0] if len(changed) == 1 else "all"].append(shape)
    return {
        name: sorted(found, key=lambda shape: cost[shape].mean)
        for name, found in axes.items()
        if name in SIDES or len(found) > 1  # all together is not at every scale
    }


def tell(points):
    """What each axis gains from its cheap end to the expensive one; which gains most and least."""
    test, cost, size = (
        means(points, shape_of, metric) for metric in ("test/accuracy", "gflops", "parameters")
    )
    seen = by_seed(points, shape_of, "test/accuracy")
    axes = axes_of(test, cost)
    header = ("axis", "depth x width x MLP x patch", "parameters", "GFLOP in training", "test")
    rows = [
        (
            NAMES[name],
            "x".join(map(str, shape)),
            f"{1000 * size[shape].mean:,.0f} k",
            f"{cost[shape].mean:,.0f}",
            test[shape],
        )
        for name, shapes in axes.items()
        for shape in shapes
    ]
    if any(len(shapes) < 3 for shapes in axes.values()):
        return Told(table(header, rows), "", "", "")
    gains = {name: less(seen[shapes[-1]], seen[shapes[0]]) for name, shapes in axes.items()}
    steps = [less(seen[b], seen[a]) for a, b in zip(axes["patch"], axes["patch"][1:], strict=False)]
    others = {side: [gains[each] for each in SIDES if each != side] for side in SIDES}
    statements = {
        "depth helps most": every(
            minus(gains["depth"], each).decides(LEAST) for each in others["depth"]
        ),
        "width helps least": every(
            minus(each, gains["width"]).decides(LEAST) for each in others["width"]
        ),
        "smaller patches help": every(step.decides(LEAST) for step in steps),
    }
    if "all" in gains:
        statements["all together help"] = gains["all"].decides(LEAST)
    order = sorted(gains, key=lambda name: -gains[name].mean)
    verdict = "From the cheap end of each axis to the expensive one: "
    verdict += "; ".join(f"{NAMES[name]} {gains[name]}" for name in order)
    small, large = (size[axes["patch"][i]].mean for i in (-1, 0))
    verdict += f". The smallest patches have {small / large - 1:+.1%} parameters, against the "
    verdict += "largest. The paper's statements: "
    verdict += "; ".join(f"{name}: {found}" for name, found in statements.items()) + "."
    found = {*statements.values()}
    agrees = "; ".join(
        f"{decision}: {', '.join(name for name, each in statements.items() if each == decision)}"
        for decision in ("yes", "no", "undecided")
        if decision in found
    )
    short = "from the cheap end to the expensive one: "
    short += ", ".join(f"{NAMES[name]} {gains[name].mean:+.1%}" for name in order)
    agrees = found.pop() if len(found) == 1 else agrees
    return Told(table(header, rows), verdict, short, agrees, drawn(axes, test, cost))


def minus(a, b):
    """The difference of two differences, seed by seed."""
    return Difference(tuple(x - y for x, y in zip(a.values, b.values, strict=True)))


def drawn(axes, test, cost):
    """Test accuracy against compute, a line an axis, all through the base; its ends are named."""
    drawing, plot = figure(7.6, 4.8)
    for i, (name, shapes) in enumerate(axes.items()):
        x, y = ([k * each[s].mean for s in shapes] for k, each in ((1, cost), (100, test)))
        colour = f"C{i}"
        plot.errorbar(
            x,
            y,
            [100 * test[s].std for s in shapes],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            label=NAMES[name],
        )
        for j in (0, -1):
            said = (
                f"{shapes[j][SIDES.index(name)]}"
                if name in SIDES
                else ("all halved", "all x 1.5")[j]
            )
            said = f"{NAMES[name]} {said}" if name in SIDES else said
            plot.annotate(
                said,
                (x[j], y[j]),
                xytext=(-6 if j == 0 else 6, 9 if name == "all" else 0),
                textcoords="offset points",
                ha="right" if j == 0 else "left",
                va="center",
                fontsize=8,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )
    base = next(iter(set.intersection(*map(set, axes.values()))))
    plot.plot(cost[base].mean, 100 * test[base].mean, "s", color="black", markersize=8, zorder=3)
    plot.annotate(
        "base: depth {}, width {},\nMLP {}, patch size {}".format(*base),
        (cost[base].mean, 100 * test[base].mean),
        xytext=(0.62, 0.9),
        textcoords="axes fraction",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "grey"},
    )
    plot.set_xscale("log")
    plot.margins(x=0.2)
    seeds = len(test[base].values)
    plot.set(
        xlabel="compute of training (GFLOP)",
        ylabel=f"test accuracy, garments (%), ± std of {seeds} seeds",
    )
    plot.set_title("A small ViT, with one side of its shape halved and doubled", fontsize=11)
    return drawing
