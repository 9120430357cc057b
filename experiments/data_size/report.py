"""The paper (section 4.3, Figures 3 and 4): with little data ResNets pre-train better, as their
convolutions know that images are local; with much data ViTs overtake them. It shows this
fine-tuned and by few-shot linear accuracy.

Here a ViT, a ResNet and a hybrid of about the same size (`configs/evidence.py`; 140,000, 118,000
and 146,000 parameters, 15, 21 and 17 MFLOP a training image) see 60,000 photographs of
Fashion-MNIST each, at 32 x 32 pixels: of 622, 2,979, 15,056 or 54,017 different ones, each number a
part of the next, without augmentation, with three seeds. They are tested on 10,000 others, and, as
the paper measures what was learnt, by ten-shot linear accuracy on the digits of MNIST. As in Figure
4 regularisation is the same for all.

Each family has the learning rate that was best with 15,000 images and another seed, by held-out
garments (`sweep.py:pilot`): the ViT 2e-3 (86.1%; 1e-3 85.7%, 4e-3 84.6%), the ResNet 8e-3 (89.8%;
4e-3 89.4%, 1.6e-2 89.6%), the hybrid 2e-3 (88.1%; 1e-3 87.8%, 4e-3 87.7%). The minutes below are of
a crowded machine: alone, a run takes half a minute to a minute of a core.

What counts was written before the runs, by test accuracy, seed by seed, with 95% intervals of
Student's t:

1. with the fewest images the ResNet is ahead of the ViT, by at least 1%;
2. with the most the ViT is ahead of the ResNet, by at least 0.5%;
3. the ResNet's lead shrinks from the fewest to the most, by at least 1%.

Each is "yes" where the mean is at least that and the interval above zero, "no" where the interval
is below it, else undecided.
"""

from reporting import Told, by_seed, curves, figure, less, means, table

TITLE = "How much data"
CLAIM = "Figures 3, 4: ResNets are better with little training data, ViTs with much"
DATA = ("fashion_mnist", "mnist")  # of experiments/packages.py
FAMILIES = {"vit": "ViT", "resnet": "ResNet", "hybrid": "hybrid"}
# The smallest mean that agrees.
AHEAD_FIRST, AHEAD_LAST, SHRINKS = 0.01, 0.005, 0.01


def key(point):
    """(family, images) of a run."""
    family, images, *_ = point.name.split("_")
    return family, int(images)


def tell(points):
    """Who is ahead with the fewest and with the most images, and does the lead shrink?"""
    test, few = means(points, key, "test/accuracy"), means(points, key, "others/10shot")
    sizes = sorted({size for _, size in test})
    families = [name for name in FAMILIES if any(name == family for family, _ in test)]
    lines = {FAMILIES[f]: {n: test[f, n] for n in sizes} for f in families}
    rows = [(f"{n:,}", *(found[f, n] for found in (test, few) for f in families)) for n in sizes]
    header = ["images", *(f"{FAMILIES[f]}, test" for f in families)]
    header += [f"{FAMILIES[f]}, digits 10-shot" for f in families]
    if len(families) < 3:
        return Told(table(header, rows), "", "", "")

    seeds = by_seed(points, key, "test/accuracy")
    leads = {n: less(seeds["resnet", n], seeds["vit", n]) for n in sizes}
    first, last = leads[sizes[0]], leads[sizes[-1]]
    behind = less(seeds["vit", sizes[-1]], seeds["resnet", sizes[-1]])
    shrinks = less(*(dict(enumerate(each.values)) for each in (first, last)))
    decided = {
        f"the ResNet is ahead with {sizes[0]:,}": first.decides(AHEAD_FIRST),
        f"the ViT with {sizes[-1]:,}": behind.decides(AHEAD_LAST),
        "the lead shrinks": shrinks.decides(SHRINKS),
    }
    rows = [(*row, leads[n]) for row, n in zip(rows, sizes, strict=True)]
    header.append("ResNet less ViT, test (95%)")
    said = "; ".join(f"{what}: {answer}" for what, answer in decided.items())
    best = [FAMILIES[max(families, key=lambda f: test[f, n].mean)] for n in (sizes[0], sizes[-1])]
    verdict = (
        f"{said[0].upper()}{said[1:]}. ResNet less ViT is {first} with {sizes[0]:,} images and "
        f"{last} with {sizes[-1]:,}; the first less the last is {shrinks}. The best of the three "
        f"on average is the {best[0]} with the fewest, the {best[1]} with the most."
    )
    agrees = "yes" if {*decided.values()} == {"yes"} else said
    short = f"ResNet less ViT, garments: {first} with {sizes[0]:,}, {last} with {sizes[-1]:,}"
    return Told(table(header, rows), verdict, short, agrees, _draw(lines, leads))


def _draw(lines, leads):
    """Accuracy of each family, and beside it by how much the ResNet is ahead of the ViT."""
    drawn, axes = figure(9, 3.8)
    axes.remove()
    left, right = drawn.subplots(1, 2)
    curves(lines, "different garments trained on", "test accuracy", axes=left)
    left.set_title("Accuracy on new garments", fontsize=10)
    sizes, (low, high) = list(leads), zip(*(each.interval for each in leads.values()), strict=True)
    means = [each.mean for each in leads.values()]
    sides = [[100 * (m - x) for m, x in zip(means, low, strict=True)]]
    sides += [[100 * (x - m) for m, x in zip(means, high, strict=True)]]
    right.errorbar(sizes, [100 * m for m in means], sides, marker="o", capsize=3, color="black")
    right.axhline(0, color="grey", linewidth=1, linestyle="--")
    for y, words in ((1, "ResNet ahead"), (-1, "ViT ahead")):
        right.annotate(
            words,
            (0.02, 0),
            (0, 8 * y),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="grey",
        )
    bottom, top = right.get_ylim()
    right.set_ylim(min(bottom, -1), max(top, 1))
    right.set_xscale("log")
    right.set_xticks(sizes, [f"{n:,}" for n in sizes])
    right.xaxis.set_minor_formatter(lambda value, _: "")
    right.set(xlabel="different garments trained on", ylabel="ResNet less ViT (% of garments)")
    right.set_title("Who is ahead (95% intervals over seeds)", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn
