"""Tracking of keypoints from frame to frame by mutual nearest neighbors with limited motion."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .matching import match
from .structs import Features, Keypoints

#: Defaults of the tracker: largest ratio of nearest to second distance, largest motion per frame as
#: a fraction of the image diagonal, number of frames that a track may miss.
RATIO, MAX_MOTION, PATIENCE = 0.9, 0.2, 1
#: Default number of positions kept of each track, which are drawn as its tail.
TAIL = 12


# ---- tracks


@dataclass(eq=False)
class Track:
    """A keypoint tracked from frame to frame.

    Attributes:
        xy: its last positions, newest last, in pixels of the frames.
        born, seen: numbers of the first and of the last frame in which it was detected.
        length: number of frames in which it was detected; 1 = a single keypoint, not yet a track.
    """

    xy: deque[tuple[float, float]]
    born: int
    seen: int
    length: int = 1

    @property
    def age(self) -> int:
        """Number of frames from its first to its last, inclusive."""
        return self.seen - self.born + 1


class Tracker:
    """Tracks keypoints through the features of consecutive frames: mutual nearest neighbors with
    limited motion.

    Args:
        ratio: largest ratio of the nearest to the second distance, see ``match``; None = no test.
        max_motion: largest motion from one frame to the next, as a fraction of the image diagonal.
        patience: number of frames that a track may miss before it ends; it is then matched by its
            last descriptor.
        history: number of positions kept of each track; None keeps all.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        ratio: float | None = RATIO,
        max_motion: float = MAX_MOTION,
        patience: int = PATIENCE,
        history: int | None = TAIL,
    ) -> None:
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
        if not max_motion > 0:
            raise ValueError(
                f"max_motion must be positive, a fraction of the image diagonal; got {max_motion}"
            )
        if patience < 0 or (history is not None and history < 1):
            raise ValueError(
                f"patience must be at least 0 and history at least 1, got {patience} and {history}"
            )
        self.ratio, self.max_motion, self.patience, self.history = (
            ratio,
            max_motion,
            patience,
            history,
        )
        self.frame = -1
        self._ended: Counter[int] = Counter()
        # matched with the next frame: keypoints of the last frame and of missed tracks
        self._known: Features | None = None
        self._tracks: list[Track] = []  # the track of each of them

    def update(self, features: Features) -> list[Track]:
        """Return the track of each of the N keypoints of the next frame; a keypoint without a match
        starts a new one, of length 1.

        A change of the frame size ends all tracks.

        Raises:
            ValueError: no descriptors, or another dimension than in the previous frame.
        """
        self.frame += 1
        if self._known is None or self._known.image_size != features.image_size:
            self.restart()
            self._known = features[:0]
        xy = features.xy.double().cpu()
        owners: list[Track | None] = [None] * len(features)
        for i, j in self._links(self._known, features, xy):
            track = owners[j] = self._tracks[i]
            track.xy.append((float(xy[j, 0]), float(xy[j, 1])))
            track.seen, track.length = self.frame, track.length + 1
        current = [
            owner or Track(deque([(x, y)], maxlen=self.history), self.frame, self.frame)
            for owner, (x, y) in zip(owners, xy.tolist(), strict=True)
        ]
        # unmatched single keypoints are dropped: they would be many, and compete with the keypoints
        # of this frame
        missed = [
            i
            for i, t in enumerate(self._tracks)
            if t.length > 1 and self.frame - self.patience <= t.seen < self.frame
        ]
        self._end(t for t in self._tracks if t.seen < self.frame - self.patience)
        self._tracks = current + [self._tracks[i] for i in missed]
        self._known = _concatenate(features, self._known[torch.tensor(missed, dtype=torch.int64)])
        return current

    def restart(self) -> None:
        """End all tracks; the next frame starts new ones."""
        self._end(self._tracks)
        self._tracks, self._known = [], None

    def lengths(self) -> Counter[int]:
        """Number of tracks of each length, including those that have not ended; keypoints detected
        once are not tracks.
        """
        return self._ended + Counter(t.length for t in self._tracks if t.length > 1)

    def _end(self, tracks: Iterable[Track]) -> None:
        self._ended.update(t.length for t in tracks if t.length > 1)

    def _links(self, known: Features, features: Features, xy: Tensor) -> list[list[int]]:
        """Pairs (index of a known keypoint, index of a keypoint of this frame)."""
        index = match(known, features, ratio=self.ratio).index.cpu()
        frames = torch.tensor([self.frame - t.seen for t in self._tracks], dtype=torch.float64)[
            index[:, 0]
        ]
        moved = (xy[index[:, 1]] - known.xy.double().cpu()[index[:, 0]]).norm(dim=1)
        return index[moved <= self.max_motion * math.hypot(*features.image_size) * frames].tolist()


def _concatenate(a: Features, b: Features) -> Features:
    # features without descriptors do not get here: match raises an error
    if a.descriptors is None or b.descriptors is None or not len(b):
        return a
    return Features(
        Keypoints.concatenate([a.keypoints, b.keypoints]),
        torch.cat([a.descriptors, b.descriptors]),
        a.image_size,
    )
