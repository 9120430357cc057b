"""The paper (section 4.3, Figures 3 and 4): with little data ResNets pre-train better, as their
convolutions know that images are local; with much data ViTs overtake them. It shows this
fine-tuned and by few-shot linear accuracy.

Here a ViT, a ResNet and a hybrid of about the same size (`configs/evidence.py`; 144,000, 141,000
and 151,000 parameters, 4.8, 4.0 and 3.3 MFLOP an image) see 40,000 images each, of 500, 2,000 or
8,000 different ones, without augmentation and with one learning rate for all; then five-shot
linear accuracy on 100 other classes of fractals, and test accuracy on digits after ten epochs of
fine-tuning. As in the paper's Figure 4 regularisation is the same for all sizes.
"""

from reporting import Told, curves, figure, means, table

TITLE = "How much data"
CLAIM = "Figures 3, 4: ResNets are better with little pre-training data, ViTs with much"
FAMILIES = {"vit": "ViT", "resnet": "ResNet", "hybrid": "hybrid"}


def key(point):
    """(family, images) of a run of either kind."""
    family, images, *_ = point.name.split("_")
    return family, int(images)


def tell(points):
    """Who is ahead at the smallest and at the largest number of images, and does the gap close?"""
    few = means(points, key)
    tuned = means(
        [point for point in points if point.name.endswith("_digits")], key, "test/accuracy"
    )
    sizes = sorted({size for _, size in few})
    families = [name for name in FAMILIES if any(name == family for family, _ in few)]
    drawn, axes = figure(9, 3.8)
    axes.remove()
    left, right = drawn.subplots(1, 2)
    for axes, found, label in (
        (left, few, "5-shot accuracy, other fractals"),
        (right, tuned, "test accuracy, digits fine-tuned"),
    ):
        lines = {FAMILIES[f]: {n: found[f, n] for n in sizes} for f in families}
        curves(lines, "pre-training images", label, axes=axes)
        axes.grid(alpha=0.3)
    rows = [
        (f"{n:,}", *(found[family, n] for found in (few, tuned) for family in families))
        for n in sizes
    ]
    header = ["images", *(f"{FAMILIES[f]}, 5-shot" for f in families)]
    header += [f"{FAMILIES[f]}, digits" for f in families]

    verdicts, gaps = [], []
    if len(families) == 3:
        for n in (sizes[0], sizes[-1]):
            vit, resnet = few["vit", n], few["resnet", n]
            gaps.append(resnet.mean - vit.mean)
            ahead = "ResNet" if resnet.beats(vit) else "ViT" if vit.beats(resnet) else ""
            best = max(families, key=lambda f: few[f, n].mean)
            told = f"the {ahead} is ahead" if ahead else "neither is ahead"
            verdicts.append((ahead, f"with {n:,} images {told}", best))
    if not verdicts:
        return Told(table(header, rows), "", "", "", drawn)
    verdict = f"Of ViT and ResNet, {verdicts[0][1]}, {verdicts[1][1]} (5-shot). ResNet less ViT: "
    verdict += f"{gaps[0]:+.1%}, then {gaps[1]:+.1%}. The best of the three is the "
    verdict += f"{FAMILIES[verdicts[0][2]]} with the fewest and the {FAMILIES[verdicts[1][2]]} "
    verdict += "with the most."
    first, last = verdicts[0][0], verdicts[1][0]
    agrees = "yes" if (first, last) == ("ResNet", "ViT") else "no"
    if agrees == "no" and first == "ResNet":
        agrees = "the first half" + ("; the gap narrows" if gaps[1] < gaps[0] else "")
    elif agrees == "no" and last == "ViT":
        agrees = "the second half"
    short = (
        f"ResNet less ViT, 5-shot: {gaps[0]:+.1%} with {sizes[0]:,} images, {gaps[1]:+.1%} with "
    )
    short += f"{sizes[-1]:,}"
    return Told(table(header, rows), verdict, short, agrees, drawn)
