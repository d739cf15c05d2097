"""Fast 5 x 5 convolutions with many channels on a CPU: Winograd's minimal filtering F(4x4, 5x5).

Source: Lavin and Gray, CVPR 2016; the transforms are Cook and Toom's for the points 0, 1, -1, 2,
-2, 1/2, -1/2 and infinity, computed exactly with fractions. 4 x 4 outputs need 64 multiplications
per pair of channels instead of 400, which is about twice as fast. The rounding error is about five
times that of direct convolution (relative 3e-5), so it is for inference.

Maps are passed from layer to layer *packed*: (h', 4, t+1, C) with C innermost; column ``4 t + c``
of the padded map is at [:, c, t], so that every step is a matrix product of contiguous memory. The
map is padded with two rows and columns of zeros in front, and to whole tiles at the end.
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
    product = [Fraction(1)]
    for root in roots:
        product = [
            (product[i - 1] if i else Fraction(0)) - (root * product[i] if i < len(product) else 0)
            for i in range(len(product) + 1)
        ]
    return product


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Matrices A (4,8), G (8,5), B (8,8), float64, with ``conv(d, g) = A ((G g) * (B d))`` for 8
    values d and 5 taps g.
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
    """Convert the maps (H,W,C) of one image to the packed layout."""
    h, w, c = maps.shape
    rows, tiles = -(-h // OUT), -(-w // OUT)
    padded = maps.new_zeros((rows + 1) * OUT, (tiles + 1) * OUT, c)
    padded[PAD : PAD + h, PAD : PAD + w] = maps
    return padded.view(-1, tiles + 1, OUT, c).permute(0, 2, 1, 3).contiguous()


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Convert packed maps to (H,W,C)."""
    rows, _, tiles, c = packed.shape
    return packed.permute(0, 2, 1, 3).reshape(rows, tiles * OUT, c)[
        PAD : PAD + height, PAD : PAD + width
    ]


class WinogradConv:
    """5 x 5 convolution with zero padding, then ReLU, of the packed maps of one image.

    Args:
        weight: (O,I,5,5).
        bias: (O,).
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        a, g, b = transforms()
        # large factors are applied to the filters, which are transformed in double precision
        norm = b.abs().sum(dim=1, keepdim=True)
        g = g * norm
        filters = torch.einsum("ak,oikl,bl->abio", g, weight.detach().double().cpu(), g)
        self.filters = filters.reshape(TILE * TILE, weight.shape[1], weight.shape[0]).to(weight)
        self.data_transform = (b / norm).to(weight)
        # the transform of columns, for the first and the last half of a tile
        self.data_first, self.data_last = (
            half.contiguous().expand(TILE, -1, -1) for half in self.data_transform.split(OUT, dim=1)
        )
        self.inverse_transform = a.to(weight)
        self.bias = bias.detach()

    def __call__(self, packed: Tensor, height: int, width: int) -> Tensor:
        """Packed maps (height, width) with I channels -> packed maps with O channels."""
        rows, _, columns, in_channels = packed.shape
        tiles, out_channels = columns - 1, self.filters.shape[2]
        out = packed.new_empty(rows, OUT, columns, out_channels)
        rows_transformed = packed.new_empty(TILE, OUT * columns * in_channels)
        transformed = packed.new_empty(TILE, TILE, tiles * in_channels)
        product = packed.new_empty(TILE * TILE, tiles, out_channels)
        rows_inverted = packed.new_empty(OUT, TILE * tiles * out_channels)
        inverted = packed.new_empty(OUT, OUT, tiles * out_channels)
        inverse_columns = self.inverse_transform.expand(OUT, -1, -1)
        for top in range(0, rows - OUT, OUT):
            torch.mm(
                self.data_transform, packed[top : top + TILE].view(TILE, -1), out=rows_transformed
            )
            # the last four columns of a tile are the first four of the next one
            by_column = rows_transformed.view(TILE, OUT, columns * in_channels)
            torch.bmm(self.data_first, by_column[:, :, : tiles * in_channels], out=transformed)
            transformed.baddbmm_(self.data_last, by_column[:, :, in_channels:])
            torch.bmm(transformed.view(TILE * TILE, tiles, in_channels), self.filters, out=product)
            torch.mm(self.inverse_transform, product.view(TILE, -1), out=rows_inverted)
            torch.bmm(inverse_columns, rows_inverted.view(OUT, TILE, -1), out=inverted)
            values = inverted.view(OUT, OUT, tiles, out_channels).add_(self.bias).relu_()
            out[top + PAD : top + PAD + OUT, PAD:, :tiles] = values[:, : OUT - PAD]
            out[top + PAD : top + PAD + OUT, :PAD, 1:] = values[:, OUT - PAD :]
        out[:PAD], out[PAD + height :] = 0, 0
        out[:, :PAD, 0] = 0
        for column in range(OUT):
            out[:, column, -((column - PAD - width) // OUT) :] = 0
        return out
