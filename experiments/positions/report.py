"""The paper (appendix D.4, Table 8) pre-trains B/16 on JFT-300M with each kind of position
embedding and measures five-shot linear accuracy on ImageNet: without one it is 61.4%, with any
other between 64.0 and 64.3%, so that which one hardly matters.

Here a ViT of 4 layers (16 patches of 8 pixels, width 64) is trained on 40,000 photographs of
Fashion-MNIST, each once (1,250 steps; `configs/evidence.py`), with each kind, five seeds (three at
first, and two more as six kinds were undecided) and one learning rate: 0.001, which was no worse
than 0.002 in a pilot of another seed, of 60,000 photographs. It is measured by its accuracy on the
10,000 of the test split.

The rule, written before the runs. Differences are paired by seed, and have 95% intervals by
Student's t. A kind is better than none if that is 1% or more and its interval above 0; it is not if
the interval is below 1%. A kind is as good as learned 1D at the input, the paper's default, if the
whole interval of their difference is within ±1%; it is not if all of it is outside. Anything else
is undecided. The paper's two statements are those about the kinds of its table; two more, and
rotary positions (as they are, and rescaled in training as DINOv3's, arXiv 2508.10104) are told
beside them.
"""

from reporting import Told, by_seed, every, figure, less, means, table

TITLE = "Position embeddings"
CLAIM = "Table 8: any position embedding is better than none; which one hardly matters"
DATA = ("fashion_mnist", "mnist")  # of experiments/packages.py
LEAST = 0.01
NONE, DEFAULT = ("none", "input"), ("learned", "input")
PAPER = {
    NONE: 0.614,
    DEFAULT: 0.642,
    ("learned", "layers"): 0.640,
    ("learned", "layers_shared"): 0.643,
    ("learned2d", "input"): 0.640,
    ("learned2d", "layers"): 0.640,
    ("learned2d", "layers_shared"): 0.640,
    ("relative", "input"): 0.640,
}
WHAT = {
    "none": "none",
    "learned": "learned 1D",
    "learned2d": "learned 2D",
    "learned2d_added": "learned 2D, rows added to columns",
    "sincos2d": "sine-cosine 2D",
    "relative": "relative",
    "rope": "rotary",
    "rope_rescaled": "rotary, rescaled in training",
}
WHERE = {"input": "", "layers": ", in every layer", "layers_shared": ", in every layer, shared"}


def kind(point):
    """What is embedded, and where."""
    what = point.overrides["model.position"]
    what += "_rescaled" if "model.rotary.rescale" in point.overrides else ""
    return what, point.overrides["model.position_at"]


def tell(points):
    """Is every kind better than none, and is each as good as the paper's default?"""
    seen = by_seed(points, kind, "test/accuracy")
    test = means(points, kind, "test/accuracy")
    more = {each: less(seen[each], seen[NONE]) for each in seen if each != NONE and NONE in seen}
    apart = {each: less(seen[each], seen[DEFAULT]) for each in more if DEFAULT in seen}
    rows = [
        (
            name(each),
            test[each],
            more.get(each, ""),
            "" if each == DEFAULT else apart.get(each, ""),
            f"{PAPER[each]:.1%}" if each in PAPER else "",
            f"{PAPER[each] - PAPER[NONE]:+.1%}" if each in PAPER and each != NONE else "",
        )
        for each in seen
    ]
    header = ("position embedding", "test", "less none", "less learned 1D")
    header += ("the paper, 5-shot", "less none")
    if not apart:
        return Told(table(header, rows), "", "", "")
    better = {each: more[each].decides(LEAST) for each in more}
    alike = {each: apart[each].within(LEAST) for each in apart if each != DEFAULT}
    ours = [each for each in more if each in PAPER]
    first = every(better[each] for each in ours)
    second = every(alike[each] for each in ours if each in alike)
    verdict = f"Better than none by 1% or more, of the paper's {len(ours)} kinds: "
    verdict += f"{counted(better, ours)}. As good as learned 1D, within ±1%: "
    verdict += f"{counted(alike, ours)}. Beside the paper's, better than none: "
    others = [each for each in more if each not in PAPER]
    verdict += f"{counted(better, others)}; as good as learned 1D: {counted(alike, others)}."
    short = f"none {test[NONE]}, learned 1D {test[DEFAULT]}; better than none: "
    short += f"{counted(better, ours, False)}; as good as learned 1D: {counted(alike, ours, False)}"
    agrees = first if first == second else f"better than none: {first}; alike: {second}"
    return Told(table(header, rows), verdict, short, agrees, drawn(seen))


def name(each):
    """As in the table and the picture."""
    return WHAT[each[0]] + WHERE[each[1]]


def counted(decisions, kinds, named=True):
    """How many are yes, no and undecided; of the last two also which."""
    said = []
    for decision in ("yes", "no", "undecided"):
        found = [name(each) for each in kinds if decisions.get(each) == decision]
        which = f" ({'; '.join(found)})" if found and named and decision != "yes" else ""
        said += [f"{decision} {len(found)}{which}"] if found else []
    return ", ".join(said)


def drawn(seen):
    """Each kind against learned 1D, here and in the paper, and the band that counts as alike."""
    drawing, axes = figure(8.6, 1.5 + 0.34 * len(seen))
    kinds = list(reversed(seen))
    seeds = len(seen[DEFAULT])
    ours = {each: less(seen[each], seen[DEFAULT]) for each in kinds if each != DEFAULT}
    rows = [kinds.index(each) for each in ours]
    means_of = [100 * each.mean for each in ours.values()]
    half = [100 * (each.interval[1] - each.mean) if seeds > 1 else 0 for each in ours.values()]
    axes.axvspan(-100 * LEAST, 100 * LEAST, color="#dcebd9", label="counts as alike: ± 1 point")
    axes.axvline(0, color="grey", linewidth=1)
    axes.errorbar(
        means_of,
        rows,
        xerr=half,
        fmt="o",
        color="#1f4e79",
        capsize=3,
        label=f"here: garments, test accuracy; {seeds} seeds, 95% interval",
    )
    there = [
        (100 * (PAPER[each] - PAPER[DEFAULT]), kinds.index(each)) for each in ours if each in PAPER
    ]
    axes.plot(
        *zip(*there, strict=True),
        "D",
        color="#c55a11",
        markerfacecolor="none",
        label="the paper: ImageNet, 5-shot accuracy",
    )
    axes.set_yticks(range(len(kinds)), [name(each) for each in kinds])
    axes.get_yticklabels()[kinds.index(DEFAULT)].set_weight("bold")
    axes.set_ylim(-0.6, len(kinds) - 0.4)
    axes.set_xlabel("accuracy, less that with learned 1D positions (percentage points)")
    axes.set_title("What a position embedding is worth, beside learned 1D (bold)", fontsize=11)
    drawing.legend(loc="outside lower center", fontsize=8, ncols=2, frameon=False)
    return drawing
