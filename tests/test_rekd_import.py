"""REKD's ``best_model.pt``: files of its layout with random numbers, by the formulas of e2cnn's
basis, compared with plain convolutions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from tiepoints.checkpoints import load_official
from tiepoints.cli import app
from tiepoints.errors import WeightsError
from tiepoints.models.rekd import REKD
from tiepoints.weights import load, save

NORM = ("weight", "bias", "running_mean", "running_var")
LIFTING, REGULAR = "('irrep_0', 'regular')", "('regular', 'regular')"
BLOCK2_BASIS, BLOCK3_BASIS = (
    f"block{i}.0._basisexpansion.block_expansion_{REGULAR}.sampled_basis" for i in (2, 3)
)
#: Group, fields of the layers, levels.
SIZES = [(4, (2, 2, 2), 3), (8, (1, 3, 2), 3), (5, (2, 1, 1), 2)]


# ---- e2cnn's basis, element by element


def rings(k: int) -> list[tuple[float, float, int]]:
    """Radius, width and highest frequency of each ring."""
    last = k // 2
    found = []
    for r in range(last + 1):
        width = 0.005 if r == 0 else 0.4 if r == last else 0.6
        cut = 0 if r == 0 else min(2 * r, 2) if r == last else min(2 * r, 2 * r - (r + 1) % 2)
        found.append((r, width, cut))
    return found


def irreps(group: int) -> dict[int, np.ndarray]:
    """Frequency -> its one or two columns of the change of basis of the regular representation."""
    angle = 2 * np.pi * np.arange(group) / group
    found = {0: np.ones((group, 1)) / math.sqrt(group)}
    for m in range(1, group // 2 + 1):
        if 2 * m == group:
            found[m] = np.cos(m * angle)[:, None] / math.sqrt(group)
        else:
            found[m] = np.stack([np.cos(m * angle), np.sin(m * angle)], axis=1) * math.sqrt(
                2 / group
            )
    return found


def angular(
    dims: tuple[int, int], frequency: int, shift: float, flip: int, phi: np.ndarray, r: np.ndarray
) -> np.ndarray:
    """Block (out, in, k, k) of one frequency between irreps of ``dims`` (in, out)."""
    if frequency == 0:
        phi = np.zeros_like(phi)
    cos, sin = np.cos(frequency * phi + shift), np.sin(frequency * phi + shift)
    if dims == (1, 1):
        block = np.array([[cos]])
    elif dims == (1, 2):
        block = np.array([[cos], [sin]])
    elif dims == (2, 1):
        block = np.array([[cos, sin]])
    else:
        sign = -1 if flip else 1
        block = np.array([[cos, -sign * sin], [sin, sign * cos]])
    return block * ((r > 0) | (frequency == 0))


def e2cnn_basis(group: int, k: int, *, lifting: bool) -> Tensor:
    """The buffer ``sampled_basis`` (elements, N, 1 or N, k*k)."""
    axis = np.arange(k) - (k - 1) / 2
    y, x = np.meshgrid(-axis, axis, indexing="ij")
    r, phi = np.hypot(x, y), np.arctan2(y, x)
    inside = {0: np.ones((1, 1))} if lifting else irreps(group)
    highest = max(f for *_, f in rings(k))
    elements = []
    for radius, width, cut in rings(k):
        profile = np.exp(-((r - radius) ** 2) / (2 * width**2))
        for (n, q_in), (m, q_out) in product(inside.items(), irreps(group).items()):
            dims = (q_in.shape[1], q_out.shape[1])
            for shift, flip in product((0, np.pi / 2), (0, 1) if dims == (2, 2) else (0,)):
                start = m - n if dims == (1, 1) or (dims == (2, 2) and flip == 0) else m + n
                for t in range(-highest - 2, highest + 3):
                    mu = start + t * group
                    if abs(mu) > cut or (dims == (1, 1) and (mu < 0 or (mu == 0 and shift > 0))):
                        continue
                    made = np.einsum(
                        "om,mnyx,in->oiyx",
                        q_out,
                        angular(dims, mu, shift, flip, phi, r) * profile,
                        q_in,
                    )
                    elements.append(made / math.sqrt((made**2).sum() / dims[1]))
    return torch.from_numpy(np.stack(elements)).flatten(3)


def expand(weights: Tensor, basis: Tensor, fields_in: int, fields_out: int) -> Tensor:
    """Ordinary filters (out, in, k, k), a sum for each pair of fields."""
    count, group, wide_in, pixels = basis.shape
    k = math.isqrt(pixels)
    made = torch.zeros(fields_out * group, fields_in * wide_in, k, k, dtype=torch.float64)
    for index, (o, i) in enumerate(product(range(fields_out), range(fields_in))):
        one = sum(
            float(w) * b
            for w, b in zip(weights[index * count : (index + 1) * count], basis, strict=True)
        )
        made[o * group : (o + 1) * group, i * wide_in : (i + 1) * wide_in] = one.view(
            group, wide_in, k, k
        )
    return made


# ---- files


def checkpoint(
    group: int = 4, dims: tuple[int, int, int] = (2, 2, 2), levels: int = 3, seed: int = 1
) -> dict[str, Tensor]:
    """All tensors of the official file, random."""
    rng = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def layer(name: str, basis: Tensor, fields_in: int, fields_out: int) -> None:
        weights = torch.randn(fields_out * fields_in * len(basis), generator=rng)
        filters = expand(weights, basis, fields_in, fields_out)
        factor = float((2 / filters.square().sum(dim=(1, 2, 3)).mean()).sqrt())
        state[f"{name}.weights"], state[f"{name}.filter"] = (
            weights * factor,
            (filters * factor).float(),
        )
        kind = LIFTING if basis.shape[2] == 1 else REGULAR
        state[f"{name}._basisexpansion.block_expansion_{kind}.sampled_basis"] = basis.float()

    def norm(name: str, width: int) -> None:
        values = {
            "weight": 1 + 0.3 * torch.randn(width, generator=rng),
            "bias": 0.3 * torch.randn(width, generator=rng),
        }
        values |= {
            "running_mean": 0.2 * torch.randn(width, generator=rng),
            "running_var": 0.1 + torch.rand(width, generator=rng),
        }
        state.update(
            {f"{name}.{kind}": value for kind, value in values.items()},
            **{f"{name}.num_batches_tracked": torch.tensor(1234)},
        )

    bases = [e2cnn_basis(group, 5, lifting=True), *[e2cnn_basis(group, 5, lifting=False)] * 2]
    for i, (basis, fields_in, fields_out) in enumerate(
        zip(bases, (1, *dims[:2]), dims, strict=True), 1
    ):
        layer(f"block{i}.0", basis, fields_in, fields_out)
        state[f"block{i}.1.indices_{group}"] = torch.tensor([0, fields_out * group])
        norm(f"block{i}.1.batch_norm_[{group}]", fields_out)
    layer("ori_learner.0", e2cnn_basis(group, 1, lifting=False), dims[2], 1)
    state |= {
        f"gpool.in_indices_{group}": torch.tensor([0, dims[2] * group]),
        f"gpool.out_indices_{group}": torch.tensor([0, dims[2]]),
    }
    norm("last_layer_learner.0", levels * dims[2])
    state["last_layer_learner.1.weight"] = 0.5 * torch.randn(
        1, levels * dims[2], 1, 1, generator=rng
    )
    state["last_layer_learner.1.bias"] = torch.rand(1, generator=rng) + 1
    return state


def parted(state: dict[str, Tensor], way: str) -> dict[str, Tensor]:
    """The file with everything, with only the filters, or as saved during training: only
    coefficients and basis.
    """
    drop = {
        "all": (),
        "filter": ("weights", "sampled_basis"),
        "basis": ("filter",),
        "neither": ("filter", "sampled_basis"),
    }[way]
    return {name: value for name, value in state.items() if not name.endswith(drop or ("\n",))}


def imported(state: dict[str, object], folder: Path, **options: float) -> REKD:
    path = folder / "trained_group36_f2_s2_t2.log"  # a name with other sizes
    torch.save(state, path)
    net = load_official(path, **options)
    assert isinstance(net, REKD)
    return net


# ---- the network from plain filters


def plain_contrast(x: Tensor) -> Tensor:
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x.numpy(), 32, mode="reflect"), (65, 65)
    )
    rows = [
        (row.mean(axis=(1, 2)), row.std(axis=(1, 2))) for row in windows
    ]  # by rows: all windows at once are 100 MB
    mean, deviation = torch.from_numpy(np.array(rows)).unbind(1)
    return (x - mean) / (1 + deviation)


def plain_rekd(
    image: Tensor, state: dict[str, Tensor], group: int, levels: int
) -> tuple[Tensor, Tensor]:
    """Score (H,W) and histogram (N,H,W) in float64."""
    p = {name: value.double() for name, value in state.items()}

    def norm(maps: Tensor, name: str, times: int) -> Tensor:
        weight, bias, mean, var = (
            p[f"{name}.{kind}"].repeat_interleave(times)[:, None, None] for kind in NORM
        )
        return (maps - mean) / (var + 1e-5).sqrt() * weight + bias

    def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
        return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=True)[0]

    u = torch.arange(-3, 4, dtype=torch.float64)
    bright = torch.exp(-(u[:, None] ** 2 + u**2) / (2 * 1.5**2)) / math.sqrt(2 * math.pi * 1.5**2)
    strengths, directions = [], []
    for level in range(levels):
        y = image
        if level:
            y = F.conv2d(image[None, None], bright[None, None], padding=3)[0]
            y = resize(y, tuple(int(side / 1.2**level) for side in image.shape))[0]
        maps = plain_contrast(y)[None]
        for i in (1, 2, 3):
            maps = F.conv2d(maps[None], p[f"block{i}.0.filter"], padding=2)[0]
            maps = norm(maps, f"block{i}.1.batch_norm_[{group}]", group).clamp(min=0)
        fields = maps.split(group)
        strengths += [resize(field.amax(dim=0, keepdim=True), image.shape) for field in fields]
        directions.append(resize(F.conv2d(maps[None], p["ori_learner.0.filter"])[0], image.shape))
    merged = norm(torch.cat(strengths), "last_layer_learner.0", 1)
    score = F.conv2d(
        merged[None], p["last_layer_learner.1.weight"], p["last_layer_learner.1.bias"]
    )[0, 0].clamp(min=0)
    return score, sum(directions).softmax(dim=0)


# ---- same function


@pytest.mark.parametrize(("group", "dims", "levels"), SIZES)
def test_basis_spans_all_filters_of_a_group_convolution(group, dims, levels):
    for k, per_orientation in ((5, 11), (1, 1)):
        basis = e2cnn_basis(group, k, lifting=False)
        assert len(basis) == torch.linalg.matrix_rank(basis.flatten(1)) == per_orientation * group
    assert len(e2cnn_basis(group, 5, lifting=True)) == 11


@pytest.mark.parametrize(("group", "dims", "levels"), SIZES)
@pytest.mark.parametrize("input_range", [1.0, 255.0])
def test_imported_network_equals_plain_convolutions(group, dims, levels, input_range, tmp_path):
    state = checkpoint(group, dims, levels)
    rng = torch.Generator().manual_seed(2)
    image = F.interpolate(
        torch.rand(1, 1, 13, 15, generator=rng, dtype=torch.float64), size=(52, 60), mode="bicubic"
    ).clamp(0, 1)
    score, histogram = plain_rekd(image[0, 0] * input_range, state, group, levels)
    assert score.count_nonzero() > score.numel() / 2
    assert histogram.amax(dim=0).mean() > 1.5 / group  # directions differ
    for way in ("all", "filter", "basis"):
        options = {} if input_range == 1 else {"input_range": input_range}
        net = imported(parted(state, way), tmp_path, **options)
        assert not net.training
        sizes = {"group": group, "dims": list(dims), "num_levels": levels, "scale_factor": 1.2}
        assert net.settings == {**sizes, "variant": "published", "input_range": input_range}
        with torch.inference_mode():
            found = net.double()(image)
        torch.testing.assert_close(found[0][0, 0], score, rtol=1e-5, atol=1e-5 * float(score.max()))
        torch.testing.assert_close(found[1][0], histogram, rtol=0, atol=1e-5)


def filters(net: REKD) -> list[Tensor]:
    return [conv.filters().detach() for conv in (*net.trunk.convs, net.orientation)]


def test_order_of_the_basis_does_not_matter(tmp_path):
    state = checkpoint(8)
    expected = filters(imported(state, tmp_path))
    shuffled = parted(state, "basis")
    for name in [name for name in shuffled if name.endswith("sampled_basis")]:
        weights = f"{name.split('._basis')[0]}.weights"
        order = torch.randperm(len(shuffled[name]), generator=torch.Generator().manual_seed(4))
        shuffled[name] = shuffled[name][order]
        shuffled[weights] = shuffled[weights].view(-1, len(order))[:, order].flatten()
    for ours, theirs in zip(filters(imported(shuffled, tmp_path)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changed", ["prefix", "wrapped", "one basis for two layers", "no indices"])
def test_other_wrappings_of_the_same_file(changed, tmp_path):
    state = checkpoint()
    other: dict[str, object] = dict(state)
    if changed == "prefix":
        other = {f"module.{name}": value for name, value in state.items()}
    elif changed == "wrapped":
        other = {"state_dict": state}
    elif changed == "one basis for two layers":
        other = {
            name: value for name, value in parted(state, "basis").items() if name != BLOCK3_BASIS
        }
    else:
        other = {name: value for name, value in state.items() if "indices" not in name}
    expected = imported(state, tmp_path).state_dict()
    for name, value in imported(other, tmp_path).state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_full_size_coefficients_round_trip(tmp_path):
    torch.manual_seed(5)
    ours = REKD(variant="published")
    state = parted(checkpoint(), "filter")  # for the names
    state = {
        name.replace("_[4]", "_[36]"): value
        for name, value in state.items()
        if "indices" not in name
    }
    state |= dict(
        zip(
            [f"block{i}.0.filter" for i in (1, 2, 3)] + ["ori_learner.0.filter"],
            filters(ours),
            strict=True,
        )
    )
    found = imported(state, tmp_path)
    assert found.settings == {**ours.settings, "input_range": 1.0}
    for name, value in ours.state_dict().items():
        if name.endswith("coefficients"):
            torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-5)


def test_round_trip_through_our_own_file_and_the_command_line(tmp_path):
    state = checkpoint(8, (1, 3, 2))
    net = imported(state, tmp_path, input_range=255.0)
    save(net, tmp_path / "ours.safetensors")
    torch.save(state, tmp_path / "best_model.pt")
    for options, input_range in ((["--input-range", "255"], 255.0), ([], 1.0)):
        out = tmp_path / f"by_command_{input_range}.safetensors"
        result = CliRunner().invoke(
            app,
            ["weights", "import", str(tmp_path / "best_model.pt"), "--output", str(out), *options],
        )
        assert result.exit_code == 0, result.output
        assert "REKD ->" in result.output
        assert load(out).settings == {**net.settings, "input_range": input_range}
    image = torch.rand(1, 1, 40, 45, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        expected = net(image)
        for file in ("ours", "by_command_255.0"):
            back = load(tmp_path / f"{file}.safetensors")
            for found, value in zip(back(image), expected, strict=True):
                torch.testing.assert_close(found, value, rtol=0, atol=0)


# ---- errors


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return checkpoint()


@pytest.fixture
def message(whole: dict[str, Tensor], tmp_path: Path) -> Callable[..., str]:
    """Error message for the file with some tensors replaced, or removed (None)."""

    def error_of(changes: dict[str, object], way: str = "all") -> str:
        state = {
            name: value
            for name, value in (parted(whole, way) | changes).items()
            if value is not None
        }
        with pytest.raises(WeightsError) as caught:
            imported(state, tmp_path)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    return error_of


def test_coefficients_without_a_basis_raise_with_reason_and_remedy(message):
    text = message({}, "neither")
    for layer in ("block1.0", "block2.0", "block3.0", "ori_learner.0"):
        assert f"{layer}: neither filters" in text
    assert text.count("e2cnn and escnn order it differently under the same names") == 1
    assert text.endswith("after eval(), which stores the filters")
    assert "eval()" not in message({"block1.0.bias": torch.zeros(8)})  # advice for this error only
    assert "block1.0: neither" in message({"block1.0.weights": None, "block1.0.filter": None})
    assert "block3.0: neither" in message(
        {"block3.0.filter": None, BLOCK2_BASIS: None, BLOCK3_BASIS: None}
    )


@pytest.mark.parametrize("layer", ["block1.0", "block2.0", "block3.0", "ori_learner.0"])
def test_filters_that_differ_from_their_coefficients_raise(layer, whole, message):
    stale = re.escape(f"{layer}.filter: differs by up to ")
    assert re.search(
        stale + r"\S+, with values up to \S+, from weights times",
        message({f"{layer}.weights": whole[f"{layer}.weights"].flip(0)}),
    )
    basis = next(
        name for name in whole if name.startswith(layer) and name.endswith("sampled_basis")
    )
    assert re.search(
        stale, message({basis: whole[basis].flip(0)})
    )  # the same elements in another order


@pytest.mark.parametrize("layer", ["block1.0", "block2.0", "block3.0", "ori_learner.0"])
def test_filters_outside_our_space_raise_with_the_residual(layer, whole, message):
    name = f"{layer}.filter"
    bent = whole[name].clone()
    bent.flatten()[7] += 1e-3 * bent.abs().max()
    text = message({name: bent}, "filter")
    assert (
        f"the filters of {name.removesuffix('.filter')} are not one filter rotated to 4 "
        "orientations" in text
    )
    residual, largest, allowed = (
        float(value) for value in re.findall(r"(?:best fit is|up to|allowed:) ([\d.e+-]*\d)", text)
    )
    assert 0.3e-3 * largest < residual < 1.1e-3 * largest
    assert math.isclose(allowed, 1e-4 * largest, rel_tol=0.1)


def test_opposite_orientation_order_raises(whole, message):
    name = "block2.0.filter"
    other = whole[name].view(2, 4, 2, 4, 5, 5).flip(1, 3).reshape(8, 8, 5, 5)
    assert "block2.0 are not one filter" in message({name: other}, "filter")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("block1.0.filter", (8, 1, 5, 5)),
        ("block2.0.weights", (176,)),
        (BLOCK3_BASIS, (44, 4, 4, 25)),
        ("ori_learner.0.filter", (4, 8, 1, 1)),
        ("block3.1.batch_norm_[4].running_mean", (2,)),
        ("block2.1.batch_norm_[4].num_batches_tracked", ()),
        ("last_layer_learner.0.num_batches_tracked", ()),
        ("last_layer_learner.0.running_var", (6,)),
        ("last_layer_learner.1.weight", (1, 6, 1, 1)),
        ("last_layer_learner.1.bias", (1,)),
    ],
)
def test_invalid_tensors_are_named_with_the_expected_shape(name, shape, whole, message):
    assert tuple(whole[name].shape) == shape
    assert f"{name}: expected shape {shape}, found {(*shape, 1)}" in message(
        {name: whole[name][..., None]}
    )
    assert f"{name}: expected shape {shape}, found a str" in message({name: "words"})
    counter = name.endswith("tracked")
    kind = "torch.int64, found torch.float32" if counter else "torch.float32, found torch.int64"
    assert f"{name}: expected {kind}" in message(
        {name: torch.zeros(shape, dtype=torch.float32 if counter else torch.int64)}
    )
    if not counter:
        assert f"{name}: expected finite values" in message({name: torch.full(shape, math.nan)})
    if not name.endswith(("filter", "weights", "basis")):
        assert f"{name}: expected shape {shape}, found nothing" in message({name: None})
    assert f"{name}_2: not expected" in message({f"{name}_2": torch.zeros(1)})


@pytest.mark.parametrize(
    "name",
    ["block1.1.indices_4", "block3.1.indices_4", "gpool.in_indices_4", "gpool.out_indices_4"],
)
def test_channel_indices_are_optional_but_checked(name, message):
    assert f"{name}: expected shape (2,), found (3,)" in message({name: torch.arange(3)})
    assert f"{name}: expected torch.int64, found torch.float32" in message({name: torch.zeros(2)})
    assert f"{name}0: not expected" in message(
        {f"{name}0": torch.zeros(2, dtype=torch.int64)}
    )  # of another group


def test_ambiguous_sizes_raise(whole, message):
    norm = "block1.1.batch_norm_[{}].weight"
    assert "batch_norm_[N].weight: expected one value per field, found nothing" in message(
        {norm.format(4): None}
    )
    assert "batch_norm_[N].weight: expected" in message(
        {norm.format(36): torch.zeros(2)}
    )  # two groups
    assert f"{norm.format(4)}: expected one value per field, found ()" in message(
        {norm.format(4): torch.tensor(1.0)}
    )
    last = "last_layer_learner.0.weight"
    assert f"{last}: expected a multiple of 2 fields, found 7" in message({last: torch.zeros(7)})
    other = {name.replace("_[4]", "_[8]"): value for name, value in whole.items()}
    assert "block1.0.filter: expected shape (16, 1, 5, 5), found (8, 1, 5, 5)" in message(
        dict.fromkeys(whole) | other
    )


def test_prefix_of_some_names_is_not_removed(whole, message):
    assert "module.last_layer_learner.1.bias: not expected" in message(
        {"module.last_layer_learner.1.bias": torch.zeros(1)}
    )


def test_input_range_must_be_positive(whole, tmp_path):
    with pytest.raises(ValueError, match="input_range must be positive"):
        imported(whole, tmp_path, input_range=0.0)
