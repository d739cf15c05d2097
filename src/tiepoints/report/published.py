"""Results from papers, shown in the report as published values.

They were measured on HPatches (59 viewpoint and 57 illumination sequences) with the authors' own
code, so they are comparable only with a run on that data with the same number of keypoints. Values
are as printed; ``None`` is a dash in the paper.
"""

from __future__ import annotations

from typing import NamedTuple

KEYNET = "Key.Net, ICCV 2019"
REKD = "REKD, CVPR 2022, table of the authors' README"
DATASET = "HPatches"


class Detection(NamedTuple):
    """Half a row of table 2: repeatability (%) and mean overlap error in SL and L, ratio of the
    largest to the smallest scale.
    """

    rep_SL: float
    rep_L: float
    err_SL: float
    err_L: float
    s_range: float | None

    def printed(self) -> dict[str, str | None]:
        """Metric name in our rows -> value as printed in the paper; None for a dash."""
        return {
            "keynet.rep_SL": f"{self.rep_SL:.1f}",
            "keynet.rep_L": f"{self.rep_L:.1f}",
            "keynet.err_SL": f"{self.err_SL:.2f}",
            "keynet.err_L": f"{self.err_L:.2f}",
            "s_range": None if self.s_range is None else f"{self.s_range:g}",
        }


class Rekd(NamedTuple):
    """A row of REKD's tables: repeatability (%), mean matching accuracy (%) at 3 and 5 px, number
    of matches per pair.
    """

    repeatability: float
    mma_3: float
    mma_5: float
    matches: float


#: Key.Net paper, table 2: detector -> (viewpoint, illumination). LIFT's equal values 51.6
#: in SL and L are as printed.
TABLE_2: dict[str, tuple[Detection, Detection]] = {
    "SIFT-SI": (Detection(43.1, 56.0, 0.18, 0.12, 78.6), Detection(46.2, 57.8, 0.18, 0.12, 84.5)),
    "SURF-SI": (Detection(46.3, 59.8, 0.18, 0.18, 24.8), Detection(52.7, 63.5, 0.15, 0.11, 27.4)),
    "FAST-TI": (Detection(30.4, 63.1, 0.21, 0.10, None), Detection(63.5, 63.5, 0.09, 0.09, None)),
    "MSER-SI": (Detection(56.4, 62.8, 0.12, 0.08, 503.7), Detection(46.5, 54.5, 0.12, 0.10, 524.8)),
    "Harris-Laplace-SI": (
        Detection(52.0, 62.9, 0.20, 0.13, 95.9),
        Detection(52.7, 63.8, 0.17, 0.08, 90.4),
    ),
    "KAZE-SI": (Detection(52.4, 64.8, 0.20, 0.11, 12.5), Detection(55.0, 63.2, 0.12, 0.10, 12.7)),
    "AKAZE-SI": (Detection(52.6, 63.9, 0.19, 0.10, 13.5), Detection(62.4, 66.5, 0.11, 0.09, 13.6)),
    "TILDE-TI": (Detection(31.0, 61.6, 0.20, 0.15, None), Detection(70.4, 70.4, 0.11, 0.11, None)),
    "LIFT-SI": (Detection(43.4, 59.4, 0.20, 0.13, 13.3), Detection(51.6, 51.6, 0.18, 0.12, 13.8)),
    "DNet-SI": (Detection(49.4, 62.2, 0.21, 0.14, 11.4), Detection(59.1, 65.1, 0.14, 0.13, 17.1)),
    "TCDET-SI": (Detection(49.6, 61.6, 0.23, 0.16, 6.7), Detection(66.9, 71.0, 0.16, 0.15, 11.4)),
    "SuperPoint-TI": (
        Detection(31.6, 64.4, 0.20, 0.17, None),
        Detection(69.9, 69.9, 0.10, 0.10, None),
    ),
    "LF-Net-SI": (Detection(30.9, 58.6, 0.23, 0.12, 2.0), Detection(68.3, 69.0, 0.10, 0.10, 2.0)),
    "Tiny-Key.Net-SI": (
        Detection(57.8, 70.4, 0.20, 0.12, 7.6),
        Detection(56.1, 62.8, 0.14, 0.11, 7.6),
    ),
    "Key.Net-TI": (
        Detection(34.2, 72.5, 0.20, 0.11, None),
        Detection(72.1, 72.1, 0.10, 0.10, None),
    ),
    "Key.Net-SI": (Detection(60.5, 73.2, 0.19, 0.14, 7.6), Detection(61.3, 66.2, 0.12, 0.10, 7.6)),
}

#: Key.Net paper, table 3: matching score (%), viewpoint and illumination.
TABLE_3: dict[str, tuple[float, float]] = {
    "MSER + HardNet": (14.2, 11.0),
    "SIFT + HardNet": (21.7, 23.9),
    "Harris-Laplace + HardNet": (23.4, 27.1),
    "AKAZE + HardNet": (32.1, 43.9),
    "TILDE + HardNet": (21.1, 39.1),
    "LIFT + HardNet": (31.9, 36.0),
    "DNet + HardNet": (24.8, 27.4),
    "TCDET + HardNet": (21.6, 30.7),
    "SuperPoint + HardNet": (25.6, 41.8),
    "LF-Net + HardNet": (24.5, 50.4),
    "LIFT": (26.8, 36.5),
    "SuperPoint": (28.5, 50.9),
    "LF-Net": (18.2, 33.1),
    "Tiny-Key.Net + HardNet": (33.2, 34.1),
    "Key.Net + HardNet": (32.3, 34.3),
}

#: Key.Net paper, table 4: learnable parameters, rounded as printed (548k, 940k, 39k, 260, 5.8k).
TABLE_4: dict[str, int] = {
    "TCDET": 548_000,
    "SuperPoint": 940_000,
    "LF-Net": 39_000,
    "Tiny-Key.Net": 260,
    "Key.Net": 5_800,
}

#: Key.Net paper, section 6.4: seconds per image of 600 x 600 pixels on a GTX 1080 Ti.
SECONDS_600: dict[str, float] = {"Tiny-Key.Net": 0.0057, "Key.Net": 0.031}

#: REKD's tables: split -> name -> row, all with HardNet. ``*``: after filtering matches by
#: rotation.
REKD_TABLES: dict[str, dict[str, Rekd]] = {
    "all": {
        "CVPR2022": Rekd(57.6, 73.1, 79.6, 505.8),
        "CVPR2022*": Rekd(57.6, 76.7, 82.3, 440.1),
        "REKD_release": Rekd(58.4, 73.5, 80.1, 511.6),
        "REKD_release*": Rekd(58.4, 77.1, 82.9, 444.4),
    },
    "view": {
        "REKD_release": Rekd(59.1, 72.5, 78.7, 464.9),
        "REKD_release*": Rekd(59.1, 75.7, 81.1, 399.8),
    },
    "illum": {
        "REKD_release": Rekd(57.6, 74.4, 81.5, 559.9),
        "REKD_release*": Rekd(57.6, 78.5, 84.7, 490.6),
    },
}

# Key.Net paper, section 6.1: repeatability (%) of variants on its synthetic validation set.

#: Figure 5 (left): M-SIP window sides -> repeatability. The check marks of its rows are assumed to
#: be: windows added from the smallest, then from the largest, then all.
FIGURE_5_WINDOWS: dict[tuple[int, ...], float] = {
    (8,): 70.5,
    (8, 16): 74.6,
    (8, 16, 24): 76.8,
    (8, 16, 24, 32): 77.6,
    (40,): 65.7,
    (32, 40): 71.4,
    (24, 32, 40): 73.2,
    (16, 24, 32, 40): 74.9,
    (8, 16, 24, 32, 40): 79.1,
}
#: Figure 5 (right), handcrafted filters and learned blocks, is a bar chart without numbers.
FIGURE_5_BLOCKS = (1, 2, 3)
FIGURE_5_HANDCRAFTED = ("both", "first", "second", "none")

#: Table 1a: pyramid levels -> repeatability, as in the text; None: not in the text.
TABLE_1A: dict[int, float | None] = {1: 72.5, 2: None, 3: 79.1, 4: None, 5: 79.5}
#: Bases of the softmax to compare for table 1b, of which the text says that the best is close to e.
TABLE_1B = (1.5, 2.0, 2.718281828459045, 5.0, 10.0)
