"""The paper (section 4.5, Figures 6 and 7, appendices D.7 and D.8) looks into trained ViTs: the
principal components of the patch embedding look like a basis for fine structure; nearby patches
have similar position embeddings, with a structure of rows and columns; attention reaches farther
with depth, while some heads see the whole image in the first layer; and attention rests on what
matters for the class.

Here the same is drawn of a ViT of 6 layers and 8x8 patches of 3x3 pixels, pre-trained on 60,000
images of fractals (`configs/evidence.py`), with images that it has not seen. The same pictures of
any model: `python -m vit_jax inspect MODEL --pictures=DIR IMAGE...`.
"""

from pathlib import Path

from reporting import Told, table

TITLE = "A look inside"
CLAIM = (
    "Figures 6, 7: nearby positions are alike; attention reaches farther with depth, in some heads "
    "far from the start"
)
IMAGES = ("a", "b")


def measure(runs, folder, count=64):
    """Draws the pictures, and sums up what they show."""
    import numpy as np
    from PIL import Image

    import vit_jax
    from vit_jax.analysis.attention import inspect_attention, position_similarity
    from vit_jax.analysis.plots import distances, pictures
    from vit_jax.data.sources import open_source
    from vit_jax.training.config import read_config

    run, folder = Path(runs) / "vit", Path(folder)
    vit, config = vit_jax.load(run), read_config(run)
    source = open_source(config.data.val.source, config.data.val.split)
    images = [source[index]["image"] for index in range(min(count, len(source)))]
    files = []
    for name, image in zip(IMAGES, images[3:], strict=False):
        files.append(folder / f"{name}.png")
        Image.fromarray(image[..., 0]).save(files[-1])
    pictures(vit, folder, files)
    for file in files:
        file.unlink()
    seen = inspect_attention(vit, images)
    distances(seen.distance, vit.config).savefig(folder / "attention_distance.png", dpi=110)
    (folder / "attention_distance.png").replace(folder / "picture.png")

    gh, gw = vit.config.grid
    similarity = position_similarity(vit.model).reshape(gh * gw, gh * gw)
    rows, columns = np.indices((gh, gw)).reshape(2, -1)
    down, across = abs(rows[:, None] - rows), abs(columns[:, None] - columns)
    by_distance = [
        float(similarity[np.maximum(down, across) == step].mean()) for step in range(1, max(gh, gw))
    ]
    far = np.maximum(down, across) > 1
    lined = far & ((down == 0) | (across == 0))
    # What the rollout gives to patches that show something, against those that are black.
    ph, pw = vit.config.patch_size
    lit = seen.images[..., 0].reshape(-1, gh, ph, gw, pw).max(axis=(2, 4)) > 0.2
    return {
        "distance": np.asarray(seen.distance).tolist(),
        "on_object": float(seen.rollout[lit].mean() / seen.rollout[~lit].mean()),
        "similarity": by_distance,
        "same_line": float(similarity[lined].mean()) if lined.any() else 0.0,
        "elsewhere": float(similarity[far & ~lined].mean()) if (far & ~lined).any() else 0.0,
        "image_size": list(vit.config.image_size),
    }


def tell(points, measured):
    """Do similarity fall and distance rise, and are there far-reaching heads in the first layer?"""
    layers = measured["distance"]
    mean = [sum(heads) / len(heads) for heads in layers]
    rows = [
        (index, f"{sum(heads) / len(heads):.1f}", f"{min(heads):.1f}", f"{max(heads):.1f}")
        for index, heads in enumerate(layers, 1)
    ]
    near, last = measured["similarity"][0], measured["similarity"][-1]
    deepest = mean[-1]
    statements = {
        "nearby positions are alike": near > measured["elsewhere"] + 0.05,
        "rows and columns are seen in the positions": measured["same_line"]
        > measured["elsewhere"] + 0.02,
        "attention reaches farther (by a twentieth or more) in the last layer than in the first": (
            deepest > 1.05 * mean[0]
        ),
        "some heads of the first layer reach as far as the last layer does on average": max(
            layers[0]
        )
        >= deepest,
        "attention rests on what is there rather than on black patches": measured["on_object"]
        > 1.2,
    }
    seen = [name for name, value in statements.items() if value]
    unseen = [name for name, value in statements.items() if not value]
    verdict = f"Cosine similarity of neighbouring positions {near:.2f}, of those "
    verdict += f"{len(measured['similarity'])} apart {last:.2f}; farther than neighbours, in the "
    verdict += "same row or column "
    verdict += f"{measured['same_line']:.2f}, elsewhere {measured['elsewhere']:.2f}. A patch that "
    verdict += (
        f"shows something gets {measured['on_object']:.1f} times the rollout of a black one. "
    )
    verdict += f"Seen: {'; '.join(seen) or 'none of it'}."
    verdict += f" Not seen: {'; '.join(unseen)}." if unseen else ""
    for name, what in (
        ("filters", "Principal components of the patch embedding's filters"),
        ("positions", "Similarity of each position to all others"),
        *((f"rollout_{name}", "Attention rollout of a held-out image") for name in IMAGES),
        *(
            (f"attention_{name}", "What the class token attends to, by layer and head")
            for name in IMAGES
        ),
    ):
        verdict += f"\n\n![{what}]({name}.png)\n{what}."
    short = f"neighbours {near:.2f} alike, others {measured['elsewhere']:.2f}; mean distance "
    short += f"{mean[0]:.1f} pixels in the first layer, {deepest:.1f} in the last"
    header = ("layer", "mean attention distance (pixels)", "nearest head", "farthest head")
    agrees = "yes" if not unseen else f"{len(seen)} of {len(statements)} statements"
    return Told(
        table(header, rows),
        verdict,
        short,
        agrees,
        spread="Attention is of 64 held-out images of {}x{} pixels.".format(
            *measured["image_size"]
        ),
    )
