"""Pixels without content: where an image is transparent, has no data, or is the uniform surround of
a rotated orthophoto.

The mask of an image excludes these pixels and ``MARGIN`` pixels around them, and the pixels are
filled from their surroundings, so that the edge of the content yields no keypoints.
"""

from __future__ import annotations

import numpy as np

#: No keypoints this close to pixels without content, in pixels of the image.
MARGIN = 8
#: Pixels this close to a transparent or uniform surround are blended with it by resampling, so they
#: are filled as well.
BLEND = 2
#: Regions without content narrower than this are defects of single pixels or lines: filled, without
#: a margin.
SPECK = 3
#: Rows of a strip: an even number.
ROWS = 256


def exclude(pixels: np.ndarray, invalid: np.ndarray) -> np.ndarray:
    """Fill pixels (H,W) without content, in place; (H,W) bool, true where keypoints may lie."""
    # erosion and dilation remove specks
    core = ~grow(~invalid, SPECK // 2)
    core = grow(core, SPECK // 2) & invalid
    fill(pixels, invalid | grow(core, BLEND))
    return ~(invalid | grow(core, MARGIN))


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilation of (H,W) bool by a square of ``2 * radius + 1`` pixels."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (radius, radius)
        windows = np.moveaxis(np.pad(mask, pad), axis, 0)
        covered = 1
        while covered < 2 * radius + 1:  # windows that start at a pixel, doubled
            step = min(covered, 2 * radius + 1 - covered)
            windows[:-step] |= windows[step:]
            covered += step
        mask = np.moveaxis(windows[: mask.shape[axis]], 0, axis)
    return mask


def connected_to_border(mask: np.ndarray) -> np.ndarray:
    """The pixels of (H,W) bool that are connected to the border of the image by others."""
    reached = np.zeros_like(mask)
    reached[[0, -1]] = mask[[0, -1]]
    reached[:, [0, -1]] = mask[:, [0, -1]]
    count = int(reached.sum())
    while True:
        reached = _spread_in_rows(mask, reached)
        reached = np.ascontiguousarray(_spread_in_rows(mask.T, reached.T).T)
        before, count = count, int(reached.sum())
        if count == before:
            return reached


def _spread_in_rows(mask: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Extend ``reached`` to the whole runs of ``mask`` in each row that it touches."""
    result = np.empty_like(mask)
    width = mask.shape[1]
    for start in range(0, len(mask), ROWS):
        part = mask[start : start + ROWS]
        starts = part.copy()
        starts[:, 1:] &= ~part[:, :-1]
        run = np.cumsum(starts, dtype=np.int32)
        touched = np.zeros(int(run[-1]) + 1, dtype=bool)
        touched[run[(reached[start : start + ROWS] & part).ravel()]] = True
        result[start : start + ROWS] = touched[run].reshape(-1, width) & part
    return result


def fill(pixels: np.ndarray, invalid: np.ndarray) -> None:
    """Replace pixels (H,W) without content, in place, by a smooth continuation of the others."""
    height, width = pixels.shape
    if invalid.all():
        pixels[:] = 0
        return
    sums, weights = [], []
    for start in range(0, height, ROWS):
        valid = (~invalid[start : start + ROWS]).astype(np.float32)
        values = pixels[start : start + ROWS] * valid
        sums.append(_halve(values))
        weights.append(_halve(valid))
    coarse = _filled(np.concatenate(sums), np.concatenate(weights))
    for start in range(0, height, ROWS):
        end = min(start + ROWS, height)
        part = invalid[start:end]
        if part.any():
            # interpolation needs one more row on each side
            first, last = max(start // 2 - 1, 0), min((end + 1) // 2 + 1, len(coarse))
            larger = _double(coarse[first:last])
            offset = start - 2 * first
            pixels[start:end][part] = larger[offset : offset + end - start, :width][part]


def _halve(values: np.ndarray) -> np.ndarray:
    """Means (h,w) of 2 x 2 pixels (H,W); an odd last row or column counts as if zeros followed."""
    height, width = values.shape
    even = np.pad(values, ((0, height % 2), (0, width % 2)))
    upper, lower = even[0::2], even[1::2]
    return (upper[:, 0::2] + upper[:, 1::2] + lower[:, 0::2] + lower[:, 1::2]) / np.float32(4)


def _double(values: np.ndarray) -> np.ndarray:
    """Values (H,W) enlarged twice: (2H,2W), bilinear, half-pixel convention."""
    for axis in (1, 0):
        values = np.moveaxis(values, axis, 0)
        before = np.concatenate([values[:1], values[:-1]])
        after = np.concatenate([values[1:], values[-1:]])
        near = np.float32(0.75) * values
        both = [np.float32(0.25) * before + near, near + np.float32(0.25) * after]
        values = np.moveaxis(np.stack(both, axis=1).reshape(-1, *values.shape[1:]), 0, axis)
    return values


def _filled(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means (h,w), and where the weights are 0, those of coarser levels."""
    means = sums / np.maximum(weights, np.float32(1e-9))
    empty = weights == 0
    if not empty.any():
        return means
    larger = _double(_filled(_halve(sums), _halve(weights)))
    return np.where(empty, larger[: means.shape[0], : means.shape[1]], means)
