"""Fixed position embeddings, and resizing of position and patch embeddings to a new model."""

from typing import Any

import numpy as np
from jaxtyping import Float

from vit_jax.errors import UserError, nearest

_OF_PIXELS = ("bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias")
_PLAIN = ("zoom", *_OF_PIXELS)
ASPECT = "_aspect"
NATIVE_METHODS = (*_PLAIN, *(method + ASPECT for method in _PLAIN))
RESIZE_METHODS = (*NATIVE_METHODS, "geometric")


def resize(
    embedding: Float[np.ndarray, "n d"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int,
    method: str = "zoom",
) -> Float[np.ndarray, "m d"]:
    """Interpolates a position embedding on its 2D grid (paper, section 3.2).

    The first `num_prefix_tokens` rows (the class token) are kept as they are. Grids are (h, w), in
    patches, and are never guessed from the number of rows.

    Args:
      method: `zoom` is the paper's, scipy.ndimage.zoom(order=1), which aligns corners. The others
        align half-pixel sample centres: `bilinear` and `bicubic` as in PyTorch's interpolate
        (cubic a = -0.75, borders repeated), and with `_antialias` as in PyTorch's antialiased
        ones, Pillow's and jax.image.resize's (a = -0.5, weights renormalised). With `_aspect`, it
        is resized to the square of the longer side, and its upper left part is taken, as by timm's
        `pos_embed_ar_preserving`: a patch is as large in both directions. `geometric` is for a
        relative position bias (see `relative.resize`); a position embedding is resized here as
        timm does it beside such a bias, by `bicubic_antialias`.

    Raises:
      UserError: the rows do not fit old grid and prefix, or the method does not exist.
    """
    rows = num_prefix_tokens + old_grid[0] * old_grid[1]
    if embedding.shape[0] != rows:
        raise UserError(
            f"a position embedding of {embedding.shape[0]} rows does not fit a grid of "
            f"{old_grid[0]}x{old_grid[1]} and {num_prefix_tokens} prefix tokens ({rows} rows)"
        )
    if method not in RESIZE_METHODS:
        raise UserError(f"position resize {method!r}: {nearest(method, RESIZE_METHODS)}")
    if tuple(old_grid) == tuple(new_grid):
        return embedding
    method = "bicubic_antialias" if method == "geometric" else method
    prefix, grid = embedding[:num_prefix_tokens], embedding[num_prefix_tokens:]
    if method.endswith(ASPECT):
        square = (max(new_grid),) * 2
        grid = resize(grid, old_grid, square, 0, method.removesuffix(ASPECT))
        grid = grid.reshape(*square, -1)[: new_grid[0], : new_grid[1]]
        return np.concatenate([prefix, grid.reshape(-1, grid.shape[-1])])
    grid = grid.reshape(*old_grid, -1)
    if method == "zoom":
        import scipy.ndimage

        factors = (new_grid[0] / old_grid[0], new_grid[1] / old_grid[1], 1)
        # Rounding puts the last sample of some grids (24 -> 42) just outside of the old one, where
        # scipy's default mode reads zeros; everywhere else the two modes agree.
        grid = scipy.ndimage.zoom(grid, factors, order=1, mode="nearest")
    else:
        down = _resize_matrix(old_grid[0], new_grid[0], method)
        across = _resize_matrix(old_grid[1], new_grid[1], method)
        grid = np.einsum("ih,jw,hwd->ijd", down, across, grid.astype(np.float64), optimize=True)
    grid = grid.reshape(new_grid[0] * new_grid[1], -1)
    return np.concatenate([prefix, grid.astype(embedding.dtype)])


def _resize_matrix(old: int, new: int, method: str) -> Float[np.ndarray, "new old"]:
    """Interpolation weights of the old samples for each new one, along one axis."""
    return sample_weights(np.arange(new), old, new, method, np)


def sample_weights(place: Any, old: int, new: Any, method: str, xp: Any) -> Any:
    """Interpolation weights [... old] of `old` samples for the places [...] of `new` ones.

    NumPy and JAX arrays alike (`xp` is the module); `new` is a number, or an array that fits.
    """
    antialias = method.endswith("_antialias")
    a = -0.5 if antialias else -0.75
    if method == "zoom":
        stretch, centres = xp.ones(()), place * ((old - 1) / xp.maximum(new - 1, 1))
    else:
        stretch = xp.maximum(old / new, 1.0) if antialias else xp.ones(())
        centres = (place + 0.5) * old / new - 0.5
    # Two samples beyond each border, which the plain methods fold back onto the border's sample.
    positions = np.arange(-2, old + 2)
    x = xp.abs(positions - centres[..., None]) / stretch[..., None]
    if method.startswith("bicubic"):
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        weights = xp.where(x <= 1, near, xp.where(x < 2, far, 0.0))
    else:
        weights = xp.maximum(1 - x, 0.0)
    inside = weights[..., 2:-2]
    if not antialias:
        for end, two in ((0, weights[..., :2]), (old - 1, weights[..., -2:])):
            inside = inside + two.sum(axis=-1, keepdims=True) * (np.arange(old) == end)
    return inside / inside.sum(axis=-1, keepdims=True)


def sincos2d(grid: tuple[int, int], width: int) -> Float[np.ndarray, "n {width}"]:
    """Fixed 2D sine-cosine embedding, temperature 10,000 (big_vision's `sincos2d`).

    Channels are, in quarters: sin and cos of the column, sin and cos of the row.
    """
    y, x = (axis.reshape(-1) for axis in np.mgrid[: grid[0], : grid[1]])
    return sincos_of(y, x, width, np).astype(np.float32)


def sincos_of(y: Any, x: Any, width: int, xp: Any) -> Any:
    """The same embedding [... width] of patches at rows y [...] and columns x [...].

    NumPy and JAX arrays alike (`xp` is the module).
    """
    omega = 1.0 / 10_000.0 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = (axis[..., None] * omega for axis in (y, x))
    return xp.concatenate([xp.sin(x), xp.cos(x), xp.sin(y), xp.cos(y)], axis=-1)


def resample_patches(
    kernel: Float[np.ndarray, "p q c d"], patch_size: tuple[int, int], method: str = "bilinear"
) -> Float[np.ndarray, "p2 q2 c d"]:
    """Resamples a patch embedding to another patch size (FlexiViT, arXiv 2212.08013, section 3.4).

    With B the matrix that resizes a patch, the new kernel is pinv(B^T) times the old one, so that
    resized patches keep their embeddings: exactly when enlarged, in least squares when shrunk.

    Args:
      method: of the resize that is undone; FlexiViT's is `bilinear`, without antialiasing.

    Raises:
      UserError: the method does not exist.
    """
    if method not in _OF_PIXELS:
        raise UserError(f"patch resize {method!r}: {nearest(method, _OF_PIXELS)}")
    down, across = (
        np.linalg.pinv(_resize_matrix(old, new, method).T)
        for old, new in zip(kernel.shape[:2], patch_size, strict=True)
    )
    new = np.einsum("ip,jq,pqcd->ijcd", down, across, kernel.astype(np.float64), optimize=True)
    return new.astype(kernel.dtype)


def adapt_channels(
    kernel: Float[np.ndarray, "p q c d"], channels: int
) -> Float[np.ndarray, "p q {channels} d"]:
    """Adapts a patch embedding to another number of input channels (timm's adapt_input_conv).

    For one channel: the sum over channels, so that a grey image has the embedding of its RGB copy.
    For any other number: channel j takes old channel j modulo the old number, scaled by old / new,
    so that images with identical channels keep the scale of their embeddings.
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % old] * np.asarray(old / channels, kernel.dtype)
