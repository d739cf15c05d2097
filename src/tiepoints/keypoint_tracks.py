"""Tracks: keypoints of several images that show one point, connected by matches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .structs import Keypoints

#: Largest extent of the keypoints of one image that are one point, detected at several scales, in
#: pixels of the smallest scale (chosen on held-out scenes, docs/diary.md).
SAME_PLACE = 3.0
#: Keypoints looked up at a time in ``_support``, to bound the memory.
BLOCK = 2**20
#: Parts of the matches that are joined one after the other.
PARTS = 16


@dataclass(frozen=True)
class Tracks:
    """Keypoints of tracks as arrays (M,), sorted by track, image and index.

    Attributes:
        names: of the images, sorted.
        track: number of the track, increasing.
        image: index of the image among ``names``.
        index: of the keypoint.
        matched: number of its matches.
    """

    names: list[str]
    track: np.ndarray
    image: np.ndarray
    index: np.ndarray
    matched: np.ndarray


def build_tracks(
    matches: Mapping[tuple[str, str], Tensor], features: Mapping[str, Keypoints] | None = None
) -> list[list[tuple[str, int]]]:
    """Tracks of matched keypoints: connected keypoints, each as (image, index), sorted.

    A track has one keypoint of each image; with ``features`` also several that lie at one place, as
    of several scales. Connected keypoints of which this is not true are divided: matches join
    tracks in the order of the number of other keypoints that are matched with both of theirs,
    unless the joined track would have two places in one image.

    Args:
        matches: (image a, image b) -> (K,2) indices, such as the verified ones.
        features: keypoints of each image.
    """
    found = connect(matches, features)
    starts = np.flatnonzero(np.diff(found.track, prepend=-1))
    nodes = [
        (found.names[i], j) for i, j in zip(found.image.tolist(), found.index.tolist(), strict=True)
    ]
    bounds = [*starts.tolist(), len(nodes)]
    return [nodes[start:end] for start, end in pairwise(bounds)]


def connect(
    matches: Mapping[tuple[str, str], Tensor], features: Mapping[str, Keypoints] | None = None
) -> Tracks:
    """The tracks of ``build_tracks`` as arrays; about 100 bytes for each match."""
    names = sorted({name for pair in matches for name in pair})
    number = {name: i for i, name in enumerate(names)}
    counts = np.zeros(len(names) + 1, np.int64)
    for pair, index in matches.items():
        if len(index):
            for name, largest in zip(pair, index.max(dim=0).values.tolist(), strict=True):
                counts[number[name] + 1] = max(counts[number[name] + 1], largest + 1)
    first = counts.cumsum()  # number of the first keypoint of each image
    whole = np.int32 if first[-1] < 2**31 else np.int64  # half the memory, if possible
    edges = np.zeros((sum(len(index) for index in matches.values()), 2), whole)
    start = 0
    for pair, index in matches.items():
        end = start + len(index)
        edges[start:end] = index.numpy() + first[[number[name] for name in pair]]
        start = end
    matched = np.bincount(edges.ravel(), minlength=first[-1])
    nodes = np.flatnonzero(matched)
    image = np.searchsorted(first, nodes, side="right") - 1
    index = nodes - first[image]
    places = None if features is None else _places(names, image, index, features)
    compact = np.zeros(first[-1], whole)
    compact[nodes] = np.arange(len(nodes))
    edges = compact[edges]
    track = _divided(edges, image, places)
    order = np.argsort(track, kind="stable")
    order = order[np.bincount(track, minlength=len(nodes))[track[order]] > 1]
    return Tracks(names, track[order], image[order], index[order], matched[nodes[order]])


def _places(
    names: list[str], image: np.ndarray, index: np.ndarray, features: Mapping[str, Keypoints]
) -> np.ndarray:
    """x, y and scale (M,3) of keypoints that are sorted by image."""
    bounds = np.searchsorted(image, np.arange(len(names) + 1))
    parts = [np.zeros((0, 3), np.float32)]
    for name, start, end in zip(names, bounds[:-1], bounds[1:], strict=True):
        chosen = features[name][torch.from_numpy(index[start:end])]
        parts.append(np.column_stack([chosen.xy.numpy(), chosen.scale.numpy()]))
    return np.concatenate(parts)


def _divided(edges: np.ndarray, image: np.ndarray, places: np.ndarray | None) -> np.ndarray:
    """Label (M,), a node, of the track of each of M nodes, which ``edges`` (E,2) connect."""
    label = _components(edges[:, 0], edges[:, 1], len(image))
    divided = _conflicting(label, image, places)
    chosen = np.flatnonzero(divided[label])
    if not len(chosen):
        return label
    compact = np.zeros(len(image), edges.dtype)
    compact[chosen] = np.arange(len(chosen))
    inner = compact[edges[divided[label[edges[:, 0]]]]]
    inner = inner[np.argsort(-_support(inner, len(chosen)), kind="stable")]
    part = _joined(inner, image[chosen], None if places is None else places[chosen])
    label[chosen] = chosen[part]
    return label


def _joined(edges: np.ndarray, image: np.ndarray, places: np.ndarray | None) -> np.ndarray:
    """Label (M,), a node, of the track of each of M nodes, which are joined along ``edges`` (E,2)
    in their order, unless that would be a conflict.

    In each round all edges are joined that are the first ones of both of their tracks: nothing that
    comes before concerns these tracks, so that the result is that of one edge after the other.
    """
    label = np.arange(len(image), dtype=edges.dtype)
    for part in np.array_split(edges, PARTS):  # later edges need not be looked at in each round
        while len(part):
            ends = label[part]
            kept = ends[:, 0] != ends[:, 1]
            part, ends = part[kept], ends[kept]
            rows = np.arange(len(part))
            first = np.full(len(image), len(part))
            np.minimum.at(first, ends.ravel(), np.repeat(rows, 2))
            joined = np.flatnonzero((first[ends] == rows[:, None]).all(axis=1))
            label, refused = _join_some(label, ends[joined], image, places)
            part = np.delete(part, joined[refused], axis=0)
    return label


def _join_some(
    label: np.ndarray, ends: np.ndarray, image: np.ndarray, places: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels with the pairs of tracks ``ends`` (K,2), all different, joined unless that would be a
    conflict, and whether it would (K,).
    """
    target = np.arange(len(image), dtype=label.dtype)
    target[ends[:, 1]] = ends[:, 0]
    touched = np.zeros(len(image), bool)
    touched[ends] = True
    members = np.flatnonzero(touched[label])
    conflict = _conflicting(
        target[label[members]],
        image[members],
        None if places is None else places[members],
        len(image),
    )[ends[:, 0]]
    target[ends[conflict, 1]] = ends[conflict, 1]
    return target[label], conflict


def _conflicting(
    label: np.ndarray, image: np.ndarray, places: np.ndarray | None, count: int | None = None
) -> np.ndarray:
    """Whether the nodes (M,) of each of ``count`` labels, M by default, lie at several places of
    one image.
    """
    conflicting = np.zeros(len(label) if count is None else count, bool)
    order = np.lexsort((image, label))
    label, image = label[order], image[order]
    starts = np.flatnonzero((np.diff(label, prepend=-1) != 0) | (np.diff(image, prepend=-1) != 0))
    several = np.diff(starts, append=len(label)) > 1
    if places is not None and several.any():
        x, y, scale = places[order].T
        extents = [
            np.maximum.reduceat(values, starts) - np.minimum.reduceat(values, starts)
            for values in (x, y)
        ]
        several &= np.hypot(*extents) > SAME_PLACE * np.minimum.reduceat(scale, starts)
    conflicting[label[starts[several]]] = True
    return conflicting


def _components(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """Smallest node (``count``,) of the connected component of each node, for edges a-b (E,)."""
    parent = np.arange(count, dtype=a.dtype)
    while len(a):
        a, b = parent[a], parent[b]
        a, b = (values[a != b] for values in (a, b))
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(above := parent[parent], parent):
            parent = above
    return parent


def _support(edges: np.ndarray, count: int) -> np.ndarray:
    """Number (E,) of nodes that edges connect with both ends of each of ``edges`` (E,2)."""
    known = np.concatenate([edges[:, end].astype(np.int64) * count for end in (0, 1)])
    known[: len(edges)] += edges[:, 1]
    known[len(edges) :] += edges[:, 0]
    known.sort()
    known = known[np.diff(known, prepend=-1) > 0]  # both directions of each edge, once
    starts = np.searchsorted(known, np.arange(count + 1) * count)
    degree = np.diff(starts)
    few, many = np.where(degree[edges[:, :1]] <= degree[edges[:, 1:]], edges, edges[:, ::-1]).T
    lookups = degree[few].cumsum()
    support = np.zeros(len(edges), np.int32)
    start = 0
    while start < len(edges):
        done = lookups[start] - degree[few[start]]
        end = max(int(np.searchsorted(lookups, done + BLOCK, side="right")), start + 1)
        each = degree[few[start:end]]
        row = np.repeat(np.arange(end - start), each)
        offset = np.arange(len(row)) - np.repeat(each.cumsum() - each, each)
        neighbor = known[starts[few[start:end]][row] + offset] % count
        wanted = many[start:end].astype(np.int64)[row] * count + neighbor
        at = np.searchsorted(known, wanted)
        found = known[np.minimum(at, len(known) - 1)] == wanted
        support[start:end] = np.bincount(row[found], minlength=end - start)
        start = end
    return support
