"""The paper (appendix D.2, Figure 8) changes one side of a ViT's shape at a time, from 8 layers,
width 1024, MLP 2048 and patches of 32. Depth helps most (less and less from 16 layers on), width
least; smaller patches help without any more parameters; and making all of them larger together
is best.

Here the base is 4 layers, width 64, MLP 128 and patches of 6 (`configs/evidence.py`), trained on
40,000 images of fractals with one learning rate; five-shot linear accuracy on 100 other classes
against the compute of training.
"""

from reporting import Told, curves, means, table

TITLE = "Depth, width, MLP, patches"
CLAIM = "Figure 8: depth helps most and width least; smaller patches help without more parameters"
NAMES = {"depth": "depth", "width": "width", "mlp": "MLP", "patch": "patch size", "all": "all"}
SIDES = ("depth", "width", "mlp", "patch")
BASE = (4, 64, 128, 6)


def axis_of(shape):
    """On which axes a shape lies: those of the base are all."""
    changed = [side for side, a, b in zip(SIDES, shape, BASE, strict=True) if a != b]
    if not changed:
        return list(NAMES)
    return changed if len(changed) == 1 else ["all"]


def tell(points):
    """What each axis gains from the base to its largest size, and which gains most and least."""

    def key(point):
        return tuple(int(part) for part in point.name.split("_")[:4])

    few, cost, size = (means(points, key, *m) for m in ((), ("gflops",), ("parameters",)))
    smaller: dict[str, float] = {}  # axes on which less than the base is better than it
    lines, rows, gains, helps = {}, [], {}, set()
    for name, label in NAMES.items():
        shapes = sorted((s for s in few if name in axis_of(s)), key=lambda s: cost[s].mean)
        lines[label] = {cost[s].mean: few[s] for s in shapes}
        for s in shapes:
            row = ("x".join(map(str, s)), f"{1000 * size[s].mean:,.0f} k", f"{cost[s].mean:,.0f}")
            rows.append((label, *row, few[s]))
        if BASE in shapes[:-1]:
            gains[name] = few[shapes[-1]].mean - few[BASE].mean
            if few[shapes[-1]].beats(few[BASE]):
                helps.add(name)
            if any(few[s].beats(few[BASE]) for s in shapes[: shapes.index(BASE)]):
                smaller[name] = max(few[s].mean for s in shapes[: shapes.index(BASE)])
    header = ("axis", "depth x width x MLP x patch", "parameters", "GFLOP in training", "5-shot")
    if len(gains) < len(NAMES):
        return Told(table(header, rows), "", "", "", None)
    drawn = curves(lines, "training compute (GFLOP)", "5-shot accuracy, other fractals")
    order = sorted(gains, key=lambda name: -gains[name])
    told = ", ".join(f"{NAMES[name]} {gains[name]:+.1%}" for name in order)
    single = [name for name in order if name != "all"]
    verdict = f"From the base to the largest of each axis: {told}. Alone, {NAMES[single[0]]} helps "
    verdict += f"most and {NAMES[single[-1]]} least, by the means; by more than twice the standard "
    verdict += "error of the difference better than the base: "
    verdict += (", ".join(NAMES[name] for name in order if name in helps) or "none") + "."
    halves = {
        "depth helps most": single[0] == "depth" and "depth" in helps,
        "width least": single[-1] == "width",
        "smaller patches help": "patch" in helps and "patch" not in smaller,
    }
    if smaller:
        reached = ", ".join(f"{NAMES[name]} ({value:.1%})" for name, value in smaller.items())
        verdict += f" But the cheap end of an axis is better than the base too: {reached}."
    seen = [name for name, value in halves.items() if value]
    verdict += " Of the paper's statements, seen here: " + (", ".join(seen) or "none") + "."
    agrees = "yes" if len(seen) == 3 else f"partly: {', '.join(seen)}" if seen else "no"
    return Told(
        table(header, rows), verdict, f"from the base to the largest: {told}", agrees, drawn
    )
