"""The paper (section 4.6, appendix B.1.2) pre-trains B/16 on JFT-300M without labels: half of the
patches are hidden or exchanged, and of each of those its mean colour is predicted, or a 4x4
version of it, or all of its pixels (slightly worse). Fine-tuned on ImageNet it has 79.9%, 2%
more than from scratch, 4% less than with labels.

Here a ViT of patches of 4x4 grey pixels is pre-trained on 40,000 images of fractals with each of
the three targets (`configs/evidence.py` with `objective=masked_colour`, `masked_small`,
`masked_pixels`), with their labels, or not at all, and fine-tuned on digits for ten epochs.
"""

from reporting import FEW, Told, dots, means, table

TITLE = "Masked patch prediction"
CLAIM = "Section 4.6: masked patches are better than nothing, and worse than labels"
NAMES = {
    "scratch": "from scratch",
    "pixels": "masked: all pixels",
    "small": "masked: 4x4",
    "colour": "masked: mean colour",
    "labels": "labels",
}
MASKED = ("colour", "small", "pixels")


def tell(points):
    """Are the targets better than no pre-training, and worse than labels?"""

    def key(point):
        return point.name.split("_")[0]

    tuned = [point for point in points if point.name.endswith("_digits")]
    before = [point for point in points if not point.name.endswith("_digits")]
    test, val = means(tuned, key, "test/accuracy"), means(tuned, key, "val/accuracy")
    few = means(before, key, FEW)
    own = means(before, key, "val/accuracy")
    shown = [name for name in NAMES if name in test]
    rows = [
        (NAMES[name], test[name], val[name], few.get(name, ""), own.get(name, "")) for name in shown
    ]
    header = ("pre-training", "digits, test", "digits, val", "fractals, 5-shot", "its own accuracy")
    drawn = dots({NAMES[name]: test[name] for name in shown}, "test accuracy on digits")
    if len(shown) < len(NAMES):
        return Told(table(header, rows), "", "", "", drawn)
    better = [name for name in MASKED if test[name].beats(test["scratch"])]
    worse = [name for name in MASKED if test["labels"].beats(test[name])]
    best = max(MASKED, key=lambda name: test[name].mean)
    verdict = f"Better than from scratch: {len(better)} of the 3 targets; worse than labels: "
    verdict += f"{len(worse)}. The best target is {NAMES[best].removeprefix('masked: ')}, "
    verdict += f"{test[best].mean - test['scratch'].mean:+.1%} against scratch and "
    verdict += f"{test[best].mean - test['labels'].mean:+.1%} against labels (the paper: +2%, -4%)."
    agrees = "yes" if best in better and best in worse else "no"
    if agrees == "no" and (best in better or best in worse):
        agrees = "the first half" if best in better else "the second half"
    short = (
        f"digits: scratch {test['scratch']}, {NAMES[best]} {test[best]}, labels {test['labels']}"
    )
    return Told(table(header, rows), verdict, short, agrees, drawn)
