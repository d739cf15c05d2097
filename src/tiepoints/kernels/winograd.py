"""5 x 5 convolutions with many channels on a CPU, about twice as fast: Winograd's minimal filtering
F(4x4, 5x5).

Source: Lavin and Gray, CVPR 2016; the transforms are Cook and Toom's for the points 0, 1, -1, 2,
-2, 1/2, -1/2 and infinity, computed exactly in fractions here. Four by four outputs cost 64
multiplications a channel pair where the plain sum has 400. Rounding is about five times that of the
plain sum (relative 3e-5): for inference.

Maps pass from layer to layer *packed*: (h', 4, t+1, C) with C innermost; column ``4 t + c`` of the
padded map lies at [:, c, t], so that every step is a matrix product of contiguous memory. Two zero
rows and columns stand before the map, the rest of a tile behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

OUT, TAPS = 4, 5
TILE = OUT + TAPS - 1
PAD = TAPS // 2
POINTS = (
    Fraction(0),
    Fraction(1),
    Fraction(-1),
    Fraction(2),
    Fraction(-2),
    Fraction(1, 2),
    Fraction(-1, 2),
)


def _matrix(rows: Sequence[Sequence[Fraction]]) -> Tensor:
    return torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64)


def _product_of_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of prod (x - root), lowest first."""
    made = [Fraction(1)]
    for root in roots:
        made = [
            (made[i - 1] if i else Fraction(0)) - (root * made[i] if i < len(made) else 0)
            for i in range(len(made) + 1)
        ]
    return made


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """A (4,8), G (8,5), B (8,8), float64, with ``conv(d, g) = A ((G g) * (B d))`` for 8 values d
    and 5 taps g.
    """
    a = [[p**i for p in POINTS] + [Fraction(int(i == OUT - 1))] for i in range(OUT)]
    g, b = [], []
    for p in POINTS:
        others = [q for q in POINTS if q != p]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        g.append([p**k / scale for k in range(TAPS)])
        b.append([*_product_of_roots(others), Fraction(0)])
    g.append([Fraction(0)] * (TAPS - 1) + [Fraction(1)])
    b.append(_product_of_roots(POINTS))
    return _matrix(a), _matrix(g), _matrix(b)


def pack(maps: Tensor) -> Tensor:
    """One image's maps (H,W,C) in the layout above."""
    h, w, c = maps.shape
    rows, tiles = -(-h // OUT), -(-w // OUT)
    padded = maps.new_zeros((rows + 1) * OUT, (tiles + 1) * OUT, c)
    padded[PAD : PAD + h, PAD : PAD + w] = maps
    return padded.view(-1, tiles + 1, OUT, c).permute(0, 2, 1, 3).contiguous()


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Packed maps as (H,W,C)."""
    rows, _, tiles, c = packed.shape
    return packed.permute(0, 2, 1, 3).reshape(rows, tiles * OUT, c)[
        PAD : PAD + height, PAD : PAD + width
    ]


class WinogradConv:
    """A convolution 5 x 5 with zeros outside, then ReLU, of one image's packed maps.

    Args:
        weight: (O,I,5,5).
        bias: (O,).
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        a, g, b = transforms()
        norm = b.abs().sum(
            dim=1, keepdim=True
        )  # moved from the maps' side to the filters', which are transformed in double precision
        g = g * norm
        filters = torch.einsum("ak,oikl,bl->abio", g, weight.detach().double().cpu(), g)
        self.filters = filters.reshape(TILE * TILE, weight.shape[1], weight.shape[0]).to(weight)
        self.forward_rows = (b / norm).to(weight)
        self.near, self.far = (
            part.contiguous().expand(TILE, -1, -1) for part in self.forward_rows.split(OUT, dim=1)
        )
        self.back_rows = a.to(weight)
        self.bias = bias.detach()

    def __call__(self, packed: Tensor, height: int, width: int) -> Tensor:
        """Packed maps of a (height, width) image with I channels -> with O."""
        rows, _, columns, channels = packed.shape
        tiles, made = columns - 1, self.filters.shape[2]
        out = packed.new_empty(rows, OUT, columns, made)
        turned = packed.new_empty(TILE, OUT * columns * channels)
        spectrum = packed.new_empty(TILE, TILE, tiles * channels)
        product = packed.new_empty(TILE * TILE, tiles, made)
        half, whole = (
            packed.new_empty(OUT, TILE * tiles * made),
            packed.new_empty(OUT, OUT, tiles * made),
        )
        inverse = self.back_rows.expand(OUT, -1, -1)
        for top in range(0, rows - OUT, OUT):
            torch.mm(self.forward_rows, packed[top : top + TILE].view(TILE, -1), out=turned)
            # a tile's last four columns are the first four of the next one
            by_column = turned.view(TILE, OUT, columns * channels)
            torch.bmm(self.near, by_column[:, :, : tiles * channels], out=spectrum)
            spectrum.baddbmm_(self.far, by_column[:, :, channels:])
            torch.bmm(spectrum.view(TILE * TILE, tiles, channels), self.filters, out=product)
            torch.mm(self.back_rows, product.view(TILE, -1), out=half)
            torch.bmm(inverse, half.view(OUT, TILE, -1), out=whole)
            values = whole.view(OUT, OUT, tiles, made).add_(self.bias).relu_()
            out[top + PAD : top + PAD + OUT, PAD:, :tiles] = values[:, : OUT - PAD]
            out[top + PAD : top + PAD + OUT, :PAD, 1:] = values[:, OUT - PAD :]
        out[:PAD], out[PAD + height :] = 0, 0
        out[:, :PAD, 0] = 0
        for column in range(OUT):
            out[:, column, -((column - PAD - width) // OUT) :] = 0
        return out
