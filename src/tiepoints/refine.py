"""Sub-pixel positions: matched keypoints aligned with each other by their pixels, and keypoints of
tracks made consistent.

A detector localizes a keypoint in each image independently, to about a pixel. Two matched keypoints
show the same surface, so the second one can be moved to where its neighborhood is most similar to
that of the first: Lucas and Kanade's registration (1981) in its inverse compositional form (Baker
and Matthews, IJCV 2004), over a translation and an affine change, on samples of zero mean and unit
variance. Refining each image independently (corner refinement) does not help: both positions must
be the same surface point.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .deformation import local_maps
from .image import ImageLike, load_image
from .keypoint_tracks import Tracks, connect
from .progress import track
from .pyramid import Level, Pyramid, build_pyramid
from .structs import Features, Keypoints, Matches

#: Samples along a side of the square window, and half its side in pixels of the keypoint's scale
#: (chosen on held-out pairs, docs/diary.md).
SAMPLES = 15
RADIUS = 8.0
SAMPLE_STEP = 2 * RADIUS / (SAMPLES - 1)
#: Gauss-Newton steps at the scale of the keypoints, and then at ``FINE_FACTOR`` times this scale,
#: at least ``MIN_SCALE`` in both images: the position of a coarse keypoint is as uncertain as its
#: window is large.
ITERATIONS, FINE_ITERATIONS = 4, 2
FINE_FACTOR, MIN_SCALE = 0.5, 0.7
#: An alignment is accepted if the normalized cross-correlation rises, to more than
#: ``MIN_CORRELATION``, and the keypoint moves by less than ``MAX_SHIFT`` pixels of its scale; at
#: the finer scale by less than ``MAX_FINE_SHIFT``.
MIN_CORRELATION = 0.6
MAX_SHIFT, MAX_FINE_SHIFT = 3.0, 2.0
#: Matches aligned at a time, to bound the memory.
CHUNK = 4096
#: Bytes of the pyramids that are kept for the next pairs of images.
CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Alignment:
    """Keypoints of b aligned with those of a.

    Attributes:
        xy: (K,2) float32 positions in b; the given ones if the alignment was not accepted.
        correlation: (K,) normalized cross-correlation of the windows at ``xy``, -1..1.
        accepted: (K,) bool.
    """

    xy: Tensor
    correlation: Tensor
    accepted: Tensor


def align(
    pyramid_a: Pyramid,
    keypoints_a: Keypoints,
    pyramid_b: Pyramid,
    keypoints_b: Keypoints,
    *,
    maps: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Alignment:
    """Align each keypoint of b with the keypoint of a in the same row.

    Args:
        pyramid_a, pyramid_b: of one image each (``pyramid.build_pyramid``).
        keypoints_a, keypoints_b: K matched keypoints.
        maps: (K,2,2) initial linear maps from the surroundings of the keypoints of a to those of b
            (``deformation.local_maps``); by default those of their scales and angles.
        iterations: Gauss-Newton steps at the scale of the keypoints.

    Raises:
        ValueError: the numbers of keypoints differ.
    """
    if len(keypoints_a) != len(keypoints_b):
        raise ValueError(
            f"expected matched keypoints, got {len(keypoints_a)} and {len(keypoints_b)}"
        )
    start = torch.eye(3, device=keypoints_a.xy.device).repeat(len(keypoints_a), 1, 1)
    if maps is not None:
        start[:, :2, :2] = torch.linalg.inv(_frame(keypoints_b)) @ maps @ _frame(keypoints_a)
    parts = [
        _align(pyramid_a, keypoints_a[part], pyramid_b, keypoints_b[part], start[part], iterations)
        for part in torch.arange(len(keypoints_a)).split(CHUNK)
    ]
    if not parts:
        return Alignment(keypoints_b.xy, keypoints_b.score, torch.zeros(0, dtype=torch.bool))
    return Alignment(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("xy", "correlation", "accepted")
        )
    )


@dataclass(frozen=True)
class _Template:
    """Windows of keypoints of a, linearized for Gauss-Newton steps.

    Attributes:
        grid: (1,S,2) offsets of the samples in the frame of a keypoint.
        values: (K,S) normalized samples.
        solve: (K,6,S), a difference of samples -> translation (2) and affine change (4).
    """

    grid: Tensor
    values: Tensor
    solve: Tensor


def _linearize(pyramid: Pyramid, keypoints: Keypoints, step: float) -> _Template:
    axis = step * (
        torch.arange(SAMPLES + 2, dtype=torch.float32, device=keypoints.xy.device)
        - (SAMPLES + 1) / 2
    )
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    outer = torch.stack([u, v], dim=-1)  # one more sample on each side, for the derivatives
    grid = outer[1:-1, 1:-1].reshape(1, -1, 2)
    unchanged = torch.eye(3, device=keypoints.xy.device).expand(len(keypoints), -1, -1)
    window = _sampler(pyramid, keypoints, step, outer.reshape(1, -1, 2))(unchanged)
    window = window.view(-1, SAMPLES + 2, SAMPLES + 2)
    dx = (window[:, 1:-1, 2:] - window[:, 1:-1, :-2]).flatten(1) / (2 * step)
    dy = (window[:, 2:, 1:-1] - window[:, :-2, 1:-1]).flatten(1) / (2 * step)
    values, deviation = _normalized(window[:, 1:-1, 1:-1].flatten(1))
    x, y = grid[..., 0], grid[..., 1]
    # derivatives (K,S,6) by translation and affine change, orthogonal to brightness and contrast
    jacobian = torch.stack([dx, dy, dx * x, dx * y, dy * x, dy * y], dim=-1) / deviation[..., None]
    jacobian = jacobian - jacobian.mean(dim=1, keepdim=True)
    jacobian = jacobian - values[..., None] * (values[..., None] * jacobian).mean(
        dim=1, keepdim=True
    )
    hessian = jacobian.transpose(1, 2) @ jacobian
    damping = 1e-4 * hessian.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-6)
    hessian = hessian + damping[:, None, None] * torch.eye(6, device=hessian.device)
    return _Template(grid, values, torch.linalg.solve(hessian, jacobian.transpose(1, 2)))


def _align(
    pyramid_a: Pyramid,
    a: Keypoints,
    pyramid_b: Pyramid,
    b: Keypoints,
    start: Tensor,
    iterations: int,
) -> Alignment:
    warp, first, last = _register(pyramid_a, a, pyramid_b, b, start, iterations)
    accepted = _plausible(warp - start, warp, MAX_SHIFT) & (last > first)
    accepted &= last > MIN_CORRELATION
    factor = _fine_factor(torch.minimum(a.scale, b.scale))
    rows = accepted.nonzero()[:, 0]
    if len(rows):
        factor = factor[rows, None]
        start = warp[rows]
        start[:, :2, 2] /= factor
        finer, before, after = _register(
            *(pyramid_a, _scaled(a[rows], factor), pyramid_b, _scaled(b[rows], factor)),
            *(start, FINE_ITERATIONS),
        )
        better = _plausible(finer - start, finer, MAX_FINE_SHIFT) & (after >= before)
        better &= after > MIN_CORRELATION
        finer[:, :2, 2] *= factor
        warp[rows[better]] = finer[better]
    moved = b.xy + (_frame(b) @ warp[:, :2, 2:])[..., 0]
    return Alignment(
        torch.where(accepted[:, None], moved, b.xy), torch.where(accepted, last, first), accepted
    )


def _fine_factor(scale: Tensor) -> Tensor:
    """Factors on scales (K,) for the second alignment."""
    return (MIN_SCALE / scale).clamp(FINE_FACTOR, 1)


def _plausible(change: Tensor, warp: Tensor, largest: float) -> Tensor:
    """Whether the translations of ``change`` (K,3,3) are at most ``largest``, and the warps (K,3,3)
    change areas less than fourfold.
    """
    area = torch.linalg.det(warp[:, :2, :2])
    return (change[:, :2, 2].norm(dim=1) < largest) & (area > 0.25) & (area < 4)


def _scaled(keypoints: Keypoints, factor: Tensor) -> Keypoints:
    """Keypoints with their scales multiplied by factors (K,1)."""
    return replace(keypoints, scale=keypoints.scale * factor[:, 0])


def _register(
    pyramid_a: Pyramid,
    a: Keypoints,
    pyramid_b: Pyramid,
    b: Keypoints,
    warp: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Affine maps (K,3,3) from the frames of the keypoints of a to those of b, starting with
    ``warp``; and the normalized cross-correlations (K,) before and after.
    """
    template = _linearize(pyramid_a, a, SAMPLE_STEP)
    sample_b = _sampler(pyramid_b, b, SAMPLE_STEP, template.grid)
    values = _normalized(sample_b(warp))[0]
    first = (values * template.values).mean(dim=1)
    for _ in range(iterations):
        change = (template.solve @ (values - template.values)[..., None])[..., 0].clamp(-1, 1)
        update = torch.eye(3, device=a.xy.device).repeat(len(a), 1, 1)
        update[:, 0, 2], update[:, 1, 2] = change[:, 0], change[:, 1]
        update[:, :2, :2] += change[:, 2:].view(-1, 2, 2).clamp(-0.3, 0.3)
        warp = warp @ torch.linalg.inv(update)
        values = _normalized(sample_b(warp))[0]
    return warp, first, (values * template.values).mean(dim=1)


def _frame(keypoints: Keypoints) -> Tensor:
    """Linear maps (K,2,2) from offsets in the frames of keypoints to pixels of the image."""
    cos, sin = (keypoints.scale * f(keypoints.angle) for f in (torch.cos, torch.sin))
    return torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2)


def _sampler(
    pyramid: Pyramid, keypoints: Keypoints, step: float, grid: Tensor
) -> Callable[[Tensor], Tensor]:
    """Function from affine maps (K,3,3) of the offsets ``grid`` (1,S,2) in frames of the keypoints
    to gray values (K,S).

    Each keypoint is sampled on the coarsest level whose pixels are no larger than the sampling
    step.
    """
    frame = _frame(keypoints)
    offsets = grid.expand(len(keypoints), -1, -1)
    chosen = _level_index(pyramid.levels, keypoints.scale, step)
    groups = [(level, (chosen == i).nonzero()[:, 0]) for i, level in enumerate(pyramid.levels)]
    groups = [(level, rows) for level, rows in groups if len(rows)]

    def sample(warp: Tensor) -> Tensor:
        in_image = frame @ warp[:, :2]  # (K,2,3)
        center = keypoints.xy[:, None] + in_image[:, None, :, 2]
        xy = torch.baddbmm(center, offsets, in_image[:, :, :2].transpose(1, 2))
        if len(groups) == 1:
            return groups[0][0].sample(xy.reshape(-1, 2)).view(xy.shape[:2])
        out = xy.new_empty(xy.shape[:2])
        for level, rows in groups:
            out[rows] = level.sample(xy[rows].reshape(-1, 2)).view(len(rows), -1)
        return out

    return sample


def _level_index(levels: list[Level], scale: Tensor, step: float) -> Tensor:
    """Index (K,) of the coarsest level whose pixels are no larger than the sampling step of
    keypoints of these scales (K,); 0 if there is none.
    """
    scales = torch.tensor([level.scale for level in levels], device=scale.device)
    return (1.05 * step * scale[:, None] >= scales[None]).sum(dim=1).sub(1).clamp(min=0)


def _normalized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (K,S) of zero mean and unit variance, and their deviations (K,1); constant rows become
    0.
    """
    centered = values - values.mean(dim=1, keepdim=True)
    deviation = centered.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4)
    return centered / deviation, deviation


def refine_matches(
    a: Features,
    b: Features,
    matches: Matches,
    images: tuple[ImageLike, ImageLike],
    *,
    iterations: int = ITERATIONS,
) -> Matches:
    """Give matches sub-pixel positions: those of ``a`` are kept, those of ``b`` are aligned with
    them.

    Args:
        a, b: features that ``matches`` index.
        images: the images of ``a`` and ``b`` (see ``image.load_image``).

    Returns:
        the same matches with ``xy_a`` and ``xy_b``.

    Raises:
        ValueError: the size of an image differs from ``image_size`` of its features.
    """
    pyramids = [build_pyramid(load_image(image)).in_memory() for image in images]
    for pyramid, features in zip(pyramids, (a, b), strict=True):
        size = (pyramid.image.shape[-1], pyramid.image.shape[-2])
        if size != tuple(features.image_size):
            raise ValueError(
                f"the image is {size[0]} x {size[1]} pixels, its features are of "
                f"{' x '.join(map(str, features.image_size))}"
            )
    index = matches.index.cpu()
    chosen_a, chosen_b = a.keypoints[index[:, 0]], b.keypoints[index[:, 1]]
    return replace(
        matches,
        xy_a=chosen_a.xy,
        xy_b=align(
            *(pyramids[0], chosen_a, pyramids[1], chosen_b),
            maps=_maps(a.keypoints, b.keypoints, index, index),
            iterations=iterations,
        ).xy,
    )


# ---- tracks


def refine_tracks(
    features: Mapping[str, Keypoints],
    matches: Mapping[tuple[str, str], Tensor],
    image: Callable[[str], ImageLike],
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """One sub-pixel position for each keypoint of each image, consistent along tracks.

    The reference of a track (``keypoint_tracks.build_tracks``) is a keypoint of a small scale,
    which has the most detail, with many matches, which shows the point from between the others;
    these are aligned with it, in as many threads as torch uses. The pyramids of at most
    ``CACHE_BYTES``, and of the pairs of images in work, are in memory at a time.

    Args:
        features: keypoints of each image.
        matches: (image a, image b) -> (K,2) indices, such as the verified ones.
        image: name -> the image (see ``image.load_image``).

    Returns:
        name -> (N,2) float32 positions of all its keypoints, unchanged for those without a track.
    """
    positions = {name: keypoints.xy.clone() for name, keypoints in features.items()}
    pyramids = _Pyramids(features, image)
    aligned = _reference_pairs(connect(matches, features), features)
    aligned.sort(key=lambda entry: (sorted(entry[0]), entry[0]))  # both directions together
    count = torch.get_num_threads()
    pending: deque[tuple[str, Tensor, Future[Alignment]]] = deque()

    def store() -> None:
        name, index, future = pending.popleft()
        positions[name][index] = future.result().xy

    # the maps are small: two threads for each operation take twice the time of the processors
    with _threads() as pool:
        for (a, b), index in track(aligned, unit="pair", label="refine", enabled=progress):
            chosen_a, chosen_b = features[a][index[:, 0]], features[b][index[:, 1]]
            maps = _maps(features[a], features[b], index, _between(a, b, matches))
            future = pool.submit(align, pyramids(a), chosen_a, pyramids(b), chosen_b, maps=maps)
            pending.append((b, index[:, 1], future))
            if len(pending) > count:
                store()
        while pending:
            store()
    return positions


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses, in each of which it computes with one."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def _between(a: str, b: str, matches: Mapping[tuple[str, str], Tensor]) -> Tensor:
    """The matches (K,2) from image a to image b."""
    if (a, b) in matches:
        return matches[a, b]
    return matches[b, a].flip(1) if (b, a) in matches else torch.zeros(0, 2, dtype=torch.long)


def _maps(a: Keypoints, b: Keypoints, index: Tensor, matched: Tensor) -> Tensor:
    """Linear maps (K,2,2) at the keypoints of ``index`` (K,2), by all that are known to be the same
    points of the two images: these, and the matches (M,2) of the images.
    """
    known = torch.unique(torch.cat([index, matched]), dim=0)
    (near_a, near_b), (at_a, at_b) = (
        (a.xy[rows[:, 0]], b.xy[rows[:, 1]]) for rows in (known, index)
    )
    return local_maps(at_a, at_b, near_a, near_b, a.scale[index[:, 0]])


def _reference_pairs(
    tracks: Tracks, features: Mapping[str, Keypoints]
) -> list[tuple[tuple[str, str], Tensor]]:
    """Pairs of images, sorted, each with the keypoints (K,2) of references in the first one, and of
    the same tracks in the second one.
    """
    scale = np.zeros(len(tracks.track), np.float32)
    by_image = np.argsort(tracks.image, kind="stable")
    bounds = np.searchsorted(tracks.image[by_image], np.arange(len(tracks.names) + 1))
    for name, start, end in zip(tracks.names, bounds[:-1], bounds[1:], strict=True):
        rows = by_image[start:end]
        scale[rows] = features[name].scale.numpy()[tracks.index[rows]]
    # the first of each track is its reference
    order = np.lexsort((scale / (tracks.matched + 1), tracks.track))
    is_first = np.diff(tracks.track, prepend=-1) > 0
    reference = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    rest = np.flatnonzero(np.arange(len(order)) != reference)
    reference = reference[rest]
    number = tracks.image[reference] * len(tracks.names) + tracks.image[rest]
    order = np.argsort(number, kind="stable")
    index = torch.from_numpy(np.stack([tracks.index[reference], tracks.index[rest]], axis=1)[order])
    numbers, starts = np.unique(number[order], return_index=True)
    parts = index.tensor_split(torch.from_numpy(starts[1:])) if len(numbers) else ()
    pairs = (divmod(int(i), len(tracks.names)) for i in numbers)
    return [
        ((tracks.names[a], tracks.names[b]), part)
        for (a, b), part in zip(pairs, parts, strict=True)
    ]


class _Pyramids:
    """The pyramids of images, the last used ones kept; without the levels that are finer than
    needed for the keypoints, as those of a large image that was reduced to extract it.
    """

    def __init__(self, features: Mapping[str, Keypoints], image: Callable[[str], ImageLike]):
        self.features, self.image = features, image
        self.kept: OrderedDict[str, Pyramid] = OrderedDict()

    def __call__(self, name: str) -> Pyramid:
        if name not in self.kept:
            levels = build_pyramid(load_image(self.image(name))).in_memory().levels
            smallest = self.features[name].scale.min()[None]
            finest = int(_level_index(levels, smallest * _fine_factor(smallest), SAMPLE_STEP))
            self.kept[name] = Pyramid(levels[finest:], 0)
        self.kept.move_to_end(name)
        while len(self.kept) > 2 and sum(map(_size, self.kept.values())) > CACHE_BYTES:
            self.kept.popitem(last=False)
        return self.kept[name]


def _size(pyramid: Pyramid) -> int:
    """Bytes of the levels."""
    return sum(4 * level.size[0] * level.size[1] for level in pyramid.levels)


def matched_pairs(
    pairs: Iterable[tuple[str, str]], read: Callable[[str, str], Matches]
) -> dict[tuple[str, str], Tensor]:
    """Indices of the matches of each pair that has any, as input of ``refine_tracks``."""
    found = {pair: read(*pair).index for pair in pairs}
    return {pair: index for pair, index in found.items() if len(index)}
