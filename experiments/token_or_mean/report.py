"""The paper (appendix D.3, Figure 9) first found global average pooling to be far worse than a
class token, and then that this was neither the extra token nor the pooling, but the learning
rate: with 3e-4 in place of 8e-4 the mean of the patches does as well.

Here both read a ViT of 4 layers, pre-trained on 24,000 images of fractals (`configs/evidence.py`),
with learning rates from 5e-4 to 8e-3; five-shot linear accuracy on 100 other classes.
"""

from reporting import Told, curves, means, table

TITLE = "Class token or global average pooling"
CLAIM = "Figure 9: both are as good, each with its own learning rate"
NAMES = {"token": "class token", "gap": "mean of patches"}


def tell(points):
    """Are they alike, each at its best rate, and are those rates different ones?"""
    few = means(points, lambda point: (point.overrides["model.pool"], point.overrides["optim.lr"]))
    rates = list(dict.fromkeys(rate for _, rate in few))
    lines = {NAMES[pool]: {rate: few[pool, rate] for rate in rates} for pool in NAMES}
    best = {pool: max(rates, key=lambda rate: few[pool, rate].mean) for pool in NAMES}
    token, gap = few["token", best["token"]], few["gap", best["gap"]]
    told = f"class token {token} at {best['token']:g}, mean of patches {gap} at {best['gap']:g}"
    worse = "mean of patches" if token.beats(gap) else "class token" if gap.beats(token) else ""
    verdict = f"At the best learning rate of each: {told}. "
    verdict += f"The {worse} is worse even so." if worse else "They cannot be told apart."
    # At the other's best rate, the paper's first mistake.
    crossed = few["gap", best["token"]]
    verdict += f" The mean of patches at the class token's best rate: {crossed}"
    apart = gap.beats(crossed)
    verdict += ", which is worse." if apart else ", which cannot be told from its own best."
    agrees = "no" if worse else "yes" if apart else "as good, but at the same rate too"
    return Told(
        table(
            ("learning rate", *NAMES.values()),
            [(f"{rate:g}", few["token", rate], few["gap", rate]) for rate in rates],
        ),
        verdict,
        told,
        agrees,
        curves(lines, "learning rate", "5-shot accuracy"),
    )
