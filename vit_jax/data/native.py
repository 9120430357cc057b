"""Images at their native size: the grid of patches that an image of any shape is resized to.

As NaFlex (SigLIP 2, arXiv 2502.14786): the image is scaled, up or down, by the largest factor at
which it has at most so many patches, both sides rounded up to whole ones.
"""

import functools

import numpy as np
from jaxtyping import Shaped


@functools.lru_cache(maxsize=4096)
def native_grid(h: int, w: int, patch_size: tuple[int, int], max_patches: int) -> tuple[int, int]:
    """The grid (down, across) of an image of h x w pixels: at most `max_patches` patches."""
    ph, pw = patch_size
    tall, wide = h * pw, w * ph  # in proportion to the exact number of rows and columns
    # The largest scale ends at a whole number of rows or of columns; the other rounds up.
    by_rows = _largest(lambda n: n * -(-n * wide // tall) <= max_patches, max_patches)
    by_columns = _largest(lambda n: n * -(-n * tall // wide) <= max_patches, max_patches)
    # With n rows, the scale is n / tall.
    if by_rows * wide >= by_columns * tall:
        return by_rows, max(-(-by_rows * wide // tall), 1)
    return -(-by_columns * tall // wide), by_columns


def _largest(fits, most: int) -> int:
    """The largest of 0 ... most that fits, where all smaller ones do."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if fits(middle) else (low, middle - 1)
    return low


def cut(
    image: Shaped[np.ndarray, "h w c"], patch_size: tuple[int, int], max_patches: int
) -> tuple[Shaped[np.ndarray, "{max_patches} p"], tuple[int, int]]:
    """Cuts an image of whole patches into them, row by row, and pads them with zeros.

    Returns:
      The patches, channels last, and their grid (down, across).
    """
    (h, w, c), (ph, pw) = image.shape, patch_size
    gh, gw = h // ph, w // pw
    patches = np.zeros((max_patches, ph * pw * c), image.dtype)
    tiles = image.reshape(gh, ph, gw, pw, c).swapaxes(1, 2)
    patches[: gh * gw] = tiles.reshape(gh * gw, -1)
    return patches, (gh, gw)
