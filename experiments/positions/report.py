"""The paper (appendix D.4, Table 8) pre-trains B/16 on JFT-300M with each kind of position
embedding and measures five-shot linear accuracy on ImageNet: without one it is 61.4%, with any
other between 64.0 and 64.3%, so that which one hardly matters.

Here a ViT of 4 layers (16 patches, width 64) is pre-trained on 40,000 images of 100 classes of
fractals (`configs/evidence.py`), and measured by five-shot linear accuracy on 100 other classes.

Rotary positions, as they are and rescaled in training as DINOv3's (arXiv 2508.10104), are points of
the sweep as well; they have not been run for the table below.
"""

from reporting import Told, dots, means, table

TITLE = "Position embeddings"
CLAIM = "Table 8: any position embedding is better than none; which one hardly matters"
PAPER = {
    ("none", "input"): "61.4%",
    ("learned", "input"): "64.2%",
    ("learned", "layers"): "64.0%",
    ("learned", "layers_shared"): "64.3%",
    ("learned2d", "input"): "64.0%",
    ("learned2d", "layers"): "64.0%",
    ("learned2d", "layers_shared"): "64.0%",
    ("relative", "input"): "64.0%",
}
WHAT = {
    "none": "none",
    "learned": "learned, 1D",
    "learned2d": "learned, 2D, concatenated",
    "learned2d_added": "learned, 2D, added",
    "sincos2d": "sine-cosine, 2D",
    "relative": "relative",
    "rope": "rotary",
    "rope_rescaled": "rotary, rescaled in training",
}
WHERE = {"input": "input", "layers": "each layer its own", "layers_shared": "each layer the same"}


def tell(points):
    """Is every kind better than none, and is one better than the paper's default?"""

    def key(point):
        what = point.overrides["model.position"]
        what += "_rescaled" if "model.rotary.rescale" in point.overrides else ""
        return what, point.overrides["model.position_at"]

    few, val = means(points, key), means(points, key, "val/accuracy")
    names = {}
    for what, where in few:
        alone = ("none", "relative", "sincos2d", "rope", "rope_rescaled")
        at = "" if what in alone else f", {WHERE[where]}"
        names[what, where] = WHAT[what] + at
    rows = [
        (WHAT[what], WHERE[where], few[what, where], val[what, where], PAPER.get((what, where), ""))
        for what, where in few
    ]
    header = ("position embedding", "added at", "5-shot, other fractals", "val", "paper")
    none, default = few.get(("none", "input")), few.get(("learned", "input"))
    if none is None or default is None:
        return Told(table(header, rows), "", "", "")
    drawn = dots(
        {names[each]: few[each] for each in few}, "5-shot accuracy", names["none", "input"]
    )
    others = [each for each in few if each[0] != "none"]
    better = [each for each in others if few[each].beats(none)]
    told = f"{len(better)} of {len(others)} kinds are better than none"
    apart = [
        f"{names[each]} is {'better' if few[each].beats(default) else 'worse'}"
        for each in others
        if few[each].beats(default) or default.beats(few[each])
    ]
    verdict = f"{told} by more than twice the standard error of the difference."
    verdict += " Against the paper's default, learned 1D at the input, "
    verdict += "; ".join(apart) + "." if apart else "none can be told apart."
    agrees = "yes" if len(better) == len(others) else "partly" if better else "no"
    if agrees == "yes" and apart:
        agrees = "the first half; here the kinds differ"
    short = f"none {none}, learned 1D {default}; {told}"
    return Told(table(header, rows), verdict, short, agrees, drawn)
