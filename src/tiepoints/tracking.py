"""Keypoints followed from frame to frame: mutual nearest neighbours that did not move too far."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .matching import match
from .structs import Features, Keypoints

#: Defaults of the tracker: largest ratio of nearest to second distance, largest motion a frame as
#: part of the image's diagonal, frames that a track may miss.
RATIO, MAX_MOTION, PATIENCE = 0.9, 0.2, 1
#: Positions drawn behind each point.
TAIL = 12


# ---- tracks


@dataclass(eq=False)
class Track:
    """A point followed from frame to frame.

    Attributes:
        xy: its last positions, newest last, in pixels of the frames.
        born, seen: numbers of the first and of the last frame that has it.
        length: in how many frames it was found; 1 is a point without a track as yet.
    """

    xy: deque[tuple[float, float]]
    born: int
    seen: int
    length: int = 1

    @property
    def age(self) -> int:
        """Frames from its first to its last, both counted."""
        return self.seen - self.born + 1


class Tracker:
    """Features of one frame after the other -> tracks: mutual nearest neighbours that did not move
    too far.

    Args:
        ratio: of the nearest to the second distance, see ``match``; None = no test.
        max_motion: farthest that a point moves from one frame to the next, as a part of the image's
            diagonal.
        patience: frames that a track may miss before it ends; it goes on from its last descriptor.
        history: positions kept of each track; None keeps all.

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
                f"max_motion must be positive, a part of the image's diagonal; got {max_motion}"
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
        self._known: Features | None = (
            None  # what the next frame is matched with: the last frame's points and missed tracks
        )
        self._tracks: list[Track] = []  # of each of these

    def update(self, features: Features) -> list[Track]:
        """The track of each of the N points of the next frame; a point that continues none begins
        one, of length 1.

        A frame of another size than the one before ends all tracks.

        Raises:
            ValueError: no descriptors, or others than those of the frame before.
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
        now = [
            owner or Track(deque([(x, y)], maxlen=self.history), self.frame, self.frame)
            for owner, (x, y) in zip(owners, xy.tolist(), strict=True)
        ]
        # single points that nothing continued are dropped: they would be many, and compete with the
        # points of this frame
        missed = [
            i
            for i, t in enumerate(self._tracks)
            if t.length > 1 and self.frame - self.patience <= t.seen < self.frame
        ]
        self._end(t for t in self._tracks if t.seen < self.frame - self.patience)
        self._tracks = now + [self._tracks[i] for i in missed]
        self._known = _joined(features, self._known[torch.tensor(missed, dtype=torch.int64)])
        return now

    def restart(self) -> None:
        """End all tracks; the next frame begins new ones."""
        self._end(self._tracks)
        self._tracks, self._known = [], None

    def lengths(self) -> Counter[int]:
        """How many tracks of each length there were, those that still go on included; points found
        once are not tracks.
        """
        return self._ended + Counter(t.length for t in self._tracks if t.length > 1)

    def _end(self, tracks: Iterable[Track]) -> None:
        self._ended.update(t.length for t in tracks if t.length > 1)

    def _links(self, known: Features, features: Features, xy: Tensor) -> list[list[int]]:
        """Pairs of a known point and a point of this frame."""
        index = match(known, features, ratio=self.ratio).index.cpu()
        frames = torch.tensor([self.frame - t.seen for t in self._tracks], dtype=torch.float64)[
            index[:, 0]
        ]
        moved = (xy[index[:, 1]] - known.xy.double().cpu()[index[:, 0]]).norm(dim=1)
        return index[moved <= self.max_motion * math.hypot(*features.image_size) * frames].tolist()


def _joined(a: Features, b: Features) -> Features:
    if (
        a.descriptors is None or b.descriptors is None or not len(b)
    ):  # match has refused those without
        return a
    return Features(
        Keypoints.concatenate([a.keypoints, b.keypoints]),
        torch.cat([a.descriptors, b.descriptors]),
        a.image_size,
    )
