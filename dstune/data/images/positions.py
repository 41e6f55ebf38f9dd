"""Compute positions for models with separate positions of time, height and width (M-RoPE of Qwen2-VL, arXiv:2409.12191)."""

from __future__ import annotations

import numpy as np


def three_positions(is_image: np.ndarray, grids: np.ndarray, merge: int) -> np.ndarray:
    """Return the positions of one sample, int64 [3, tokens]: time, height and width.

    is_image: whether each token belongs to an image, bool [tokens]. grids: patches of each image, int [images, 3] (time,
    height, width); merge x merge patches make one token. Text continues in all three rows after the largest position before
    it. Example, an image of 1 x 2 x 2 tokens between two words:

        time    0  1 1 1 1  3
        height  0  1 1 2 2  3
        width   0  1 2 1 2  3
    """
    positions = np.empty((3, len(is_image)), dtype=np.int64)
    edges = np.flatnonzero(np.diff(is_image, prepend=not is_image[0] if len(is_image) else False))
    following = image = 0
    for start, end in zip(edges.tolist(), [*edges[1:].tolist(), len(is_image)], strict=True):
        if not is_image[start]:
            positions[:, start:end] = following + np.arange(end - start)
            following += end - start
            continue
        at = start
        while at < end:  # adjacent images
            time, height, width = (int(size) for size in grids[image])
            shape = (time, height // merge, width // merge)
            count = shape[0] * shape[1] * shape[2]
            positions[:, at : at + count] = following + np.indices(shape).reshape(3, -1)
            following += max(shape)
            at, image = at + count, image + 1
    assert image == len(grids), "an image without tokens"
    return positions
