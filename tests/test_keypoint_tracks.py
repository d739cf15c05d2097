"""Tracks of matched keypoints."""

import numpy as np
import pytest
import torch

from tiepoints import keypoint_tracks
from tiepoints.keypoint_tracks import SAME_PLACE, build_tracks
from tiepoints.structs import Keypoints


def keypoints(xy):
    count = len(xy)
    return Keypoints(torch.tensor(xy), torch.ones(count), torch.zeros(count), torch.ones(count))


def pair(*rows):
    return torch.tensor(rows)


def test_connected_keypoints_are_a_track():
    matches = {("a", "b"): pair([0, 1], [4, 4]), ("b", "c"): pair([1, 5]), ("a", "c"): pair([0, 5])}
    assert build_tracks(matches) == [[("a", 0), ("b", 1), ("c", 5)], [("a", 4), ("b", 4)]]
    assert build_tracks({}) == []
    assert build_tracks({("a", "b"): torch.zeros(0, 2, dtype=torch.int64)}) == []


def test_contradictory_matches_divide_a_track_where_fewest_others_agree():
    matches = {
        ("a", "b"): pair([0, 0], [1, 1]),
        ("b", "c"): pair([0, 0], [1, 1]),
        ("a", "c"): pair([0, 0]),
        ("c", "d"): pair([0, 0]),
        ("b", "d"): pair([1, 0]),  # connects the two, without another match that agrees
    }
    assert build_tracks(matches) == [
        [("a", 0), ("b", 0), ("c", 0), ("d", 0)],
        [("a", 1), ("b", 1), ("c", 1)],
    ]


def test_keypoints_of_one_place_are_in_one_track():
    matches = {("a", "b"): pair([0, 0], [2, 1]), ("b", "c"): pair([0, 0]), ("a", "c"): pair([1, 0])}
    near = SAME_PLACE - 0.1
    features = {
        "a": keypoints([[10.0, 10.0], [10.0 + near, 10.0], [40.0, 10.0]]),
        "b": keypoints([[12.0, 10.0], [42.0, 10.0]]),
        "c": keypoints([[14.0, 10.0]]),
    }
    expected = [[("a", 0), ("a", 1), ("b", 0), ("c", 0)], [("a", 2), ("b", 1)]]
    assert build_tracks(matches, features) == expected
    features["a"].xy[1, 0] += 0.2
    divided = build_tracks(matches, features)
    assert len(divided) == 2
    assert all(len({image for image, _ in track}) == len(track) for track in divided)


def one_after_the_other(edges, image, places):
    """The specification of ``_joined``."""
    label = np.arange(len(image))
    for a, b in edges:
        members = np.flatnonzero((label == label[a]) | (label == label[b]))
        for number in set(image[members]):
            same = members[image[members] == number]
            if len(same) < 2:
                continue
            extent = None if places is None else np.hypot(*np.ptp(places[same, :2], axis=0))
            if extent is None or extent > SAME_PLACE * places[same, 2].min():
                break
        else:
            label[members] = label[a]
    return label


@pytest.mark.parametrize("seed", range(20))
def test_rounds_join_as_one_match_after_the_other(seed):
    rng = np.random.default_rng(seed)
    count = 60
    image = np.sort(rng.integers(0, 8, count))
    edges = rng.integers(0, count, (120, 2))
    edges = edges[edges[:, 0] != edges[:, 1]]
    places = np.column_stack([rng.uniform(0, 6, (count, 2)), rng.uniform(0.5, 2, count)])
    for given in (None, places.astype(np.float32)):
        found = keypoint_tracks._joined(edges, image, given)
        expected = one_after_the_other(edges, image, given)
        assert ((found[:, None] == found) == (expected[:, None] == expected)).all()


def test_support_is_the_number_of_common_neighbors(monkeypatch):
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 30, (100, 2))
    edges = edges[edges[:, 0] != edges[:, 1]]
    connected = np.zeros((30, 30), int)
    connected[edges[:, 0], edges[:, 1]] = connected[edges[:, 1], edges[:, 0]] = 1
    expected = (connected @ connected)[edges[:, 0], edges[:, 1]]
    for block in (2**22, 1, 10):
        monkeypatch.setattr(keypoint_tracks, "BLOCK", block)
        assert (keypoint_tracks._support(edges, 30) == expected).all()
