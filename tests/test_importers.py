"""Published checkpoints: outputs of the official code, strict import, and export to kornia."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiepoints.checkpoints import load_official, to_official_state_dict
from tiepoints.errors import WeightsError
from tiepoints.extract import build
from tiepoints.filters import normalize_contrast, unnormalized_gaussian_taps
from tiepoints.models.keynet import KeyNet, handcrafted_channels
from tiepoints.models.keynet_legacy import LegacyKeyNet, divide_by_maximum, level_size
from tiepoints.models.patchnets import HardNet, HyNet, SOSNet

CROPS = ("graf1_crop", "boat1_crop", "leuven1")
NORM = ("weight", "bias", "running_mean", "running_var")
FILES = {"A": "keynet_pytorch.pth", "B": "tf_keynet_weights.npz", "C": "rekd_keyNet.pt"}


def as_image(gray: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gray.astype(np.float32) / 255)[None, None]


@torch.inference_mode()
def score(net: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    return net(image)


# ---- checkpoints of random numbers in the three published layouts


def random_tensors(
    generator: torch.Generator, shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    made = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(7)
        elif name.endswith(("running_var", "moving_variance")):
            made[name] = torch.rand(shape, generator=generator) + 0.5
        elif shape == (1,):  # the last bias: high enough that the output is not zero everywhere
            made[name] = torch.rand(shape, generator=generator) + 2
        else:
            made[name] = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 4 else 0.5)
    return made


def official_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        name = f"feature_extractor.lb_block.conv{i}"
        shapes |= {f"{name}.0.weight": (8, 8 if i else 10, 5, 5), f"{name}.0.bias": (8,)}
        shapes |= {f"{name}.1.{kind}": (8,) for kind in NORM} | {
            f"{name}.1.num_batches_tracked": ()
        }
    return shapes | {"last_conv.0.weight": (1, 24, 5, 5), "last_conv.0.bias": (1,)}


def tensorflow_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inside, outside in (("1", 10, 8), ("2", 8, 8), ("3", 8, 8), ("last_layer", 24, 1)):
        shapes |= {f"conv_{name}/kernel": (5, 5, inside, outside), f"conv_{name}/bias": (outside,)}
    for name, width in (("1", 8), ("2", 8), ("3", 8), ("final", 24)):
        shapes |= {
            f"batch_{name}/{kind}": (width,)
            for kind in ("gamma", "beta", "moving_mean", "moving_variance")
        }
    return {f"model_deep_detector_{name}": shape for name, shape in shapes.items()}


def rekd_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        shapes |= {
            f"learner.conv_{i}.weight": (8, 8 if i else 10, 5, 5),
            f"learner.conv_{i}.bias": (8,),
        }
        shapes |= {f"learner.bn_{i}.{kind}": (8,) for kind in NORM} | {
            f"learner.bn_{i}.num_batches_tracked": ()
        }
    last = "last_layer_learner"
    shapes |= {f"{last}.bn_last.{kind}": (24,) for kind in NORM} | {
        f"{last}.bn_last.num_batches_tracked": ()
    }
    return shapes | {f"{last}.conv_last.weight": (1, 24, 1, 1), f"{last}.conv_last.bias": (1,)}


SHAPES = {"A": official_shapes, "B": tensorflow_shapes, "C": rekd_shapes}


def write(layout: str, tensors: dict[str, torch.Tensor], path: Path) -> Path:
    if layout == "B":
        with path.open("wb") as stream:  # an open file, so that NumPy adds no ending
            np.savez(stream, **{name: value.numpy() for name, value in tensors.items()})
    elif layout == "A":
        content = {
            "state_dict": OrderedDict(tensors),
            "optimizer": {"state": {}, "param_groups": []},
        }
        torch.save(
            content, path, _use_new_zipfile_serialization=False
        )  # the official file has the old format
    else:
        nested: OrderedDict[str, OrderedDict[str, torch.Tensor]] = OrderedDict()
        for name, value in tensors.items():
            group, rest = name.split(".", 1)
            nested.setdefault(group, OrderedDict())[rest] = value
        torch.save(nested, path)
    return path


@pytest.fixture
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {layout: random_tensors(generator, shapes()) for layout, shapes in SHAPES.items()}


# ---- reference implementation of LegacyKeyNet from raw checkpoint tensors


def norm(x: torch.Tensor, p: dict[str, torch.Tensor], name: str, eps: float) -> torch.Tensor:
    weight, bias, mean, var = (p[f"{name}.{kind}"][:, None, None] for kind in NORM)
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def plain_contrast(x: torch.Tensor) -> torch.Tensor:
    h, w = x.shape
    padded = np.pad(x.numpy(), 32, mode="reflect")
    windows = torch.from_numpy(
        np.lib.stride_tricks.sliding_window_view(padded, (65, 65)).reshape(h, w, -1).copy()
    )
    return (x - windows.mean(-1)) / (1 + windows.std(-1, correction=0))


def plain_legacy(image: np.ndarray, p: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    """Score map (H,W) in float64 of an image (H,W), as specified."""
    p = {name: value.double() for name, value in p.items()}
    x = torch.from_numpy(image.astype(np.float64))
    x = x / x.max()
    u = torch.arange(-3, 4, dtype=torch.float64)
    kernel = torch.exp(-(u[:, None] ** 2 + u**2) / (2 * 1.5**2)) / math.sqrt(2 * math.pi * 1.5**2)
    kx = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)

    def correlate(a: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.conv2d(a[None, None], k[None, None], padding=k.shape[-1] // 2)[0, 0]

    maps = []
    for level in range(3):
        y = x
        if level:
            size = [int(side / 1.2**level) for side in x.shape]
            y = F.interpolate(
                correlate(x, kernel)[None, None], size=size, mode="bilinear", align_corners=True
            )[0, 0]
        y = plain_contrast(y)
        dx, dy = correlate(y, kx), correlate(y, kx.T)
        dxx, dxy, dyy = correlate(dx, kx), correlate(dx, kx.T), correlate(dy, kx.T)
        f = torch.stack([dx, dx**2, dxx, dy, dy**2, dyy, dx * dy, dxx * dyy, dxy, dxy**2])
        for i in range(3):
            f = F.conv2d(f[None], p[f"conv{i}.weight"], p[f"conv{i}.bias"], padding=2)[0]
            f = norm(f, p, f"bn{i}", eps).clamp(min=0)
        maps.append(F.interpolate(f[None], size=x.shape, mode="bilinear", align_corners=True)[0])
    merged = norm(torch.cat(maps), p, "bn_last", eps)
    last = p["last.weight"]
    return F.conv2d(merged[None], last, p["last.bias"], padding=last.shape[-1] // 2)[0, 0].clamp(
        min=0
    )


def plain_names(layout: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors under the names that ``plain_legacy`` uses."""
    p = {}
    for name, value in tensors.items():
        if layout == "C":
            name = name.split(".", 1)[1].replace("conv_last", "last").replace("conv_", "conv")
            p[
                name.replace("bn_last", "bnlast").replace("bn_", "bn").replace("bnlast", "bn_last")
            ] = value
        else:
            part, kind = name.removeprefix("model_deep_detector_").split("/")
            part = {"conv_last_layer": "last", "batch_final": "bn_last"}.get(part) or (
                part[:-2].replace("batch", "bn") + str(int(part[-1]) - 1)
            )
            kind = {"kernel": "weight", "gamma": "weight", "beta": "bias"}.get(kind, kind)
            kind = kind.replace("moving_variance", "running_var").replace("moving", "running")
            p[f"{part}.{kind}"] = value.permute(3, 2, 0, 1) if value.ndim == 4 else value
    return p


# ---- reference values


@pytest.mark.parametrize("crop", CROPS)
def test_variant_a_equals_the_official_score_maps(reference_dir: Path, crop: str) -> None:
    net = load_official(reference_dir / "checkpoints" / FILES["A"])
    gold = np.load(reference_dir / "keynet_scoremaps.npz")
    found = score(net, as_image(gold[f"{crop}_image"]))[0, 0].numpy()
    np.testing.assert_allclose(found, gold[f"{crop}_score"], rtol=1e-4, atol=0)


def test_variant_a_equals_the_official_inner_maps(reference_dir: Path) -> None:
    net = load_official(reference_dir / "checkpoints" / FILES["A"])
    assert isinstance(net, KeyNet)
    gold = np.load(reference_dir / "keynet_scoremaps.npz")
    made = torch.cat(handcrafted_channels(as_image(gold["graf1_crop_image"])), dim=1)
    np.testing.assert_allclose(
        made[0].numpy(), gold["graf1_crop_handcrafted"], rtol=1e-4, atol=1e-7
    )
    with torch.inference_mode():
        learned = net.blocks(made)[0].numpy()
    np.testing.assert_allclose(
        learned, gold["graf1_crop_learned_level0"], rtol=1e-4, atol=1e-4
    )  # values to 122


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("mode", ["as_shipped", "full_restore"])
def test_variant_b_equals_the_official_score_maps(
    reference_dir: Path, crop: str, mode: str
) -> None:
    restore = mode == "full_restore"
    net = load_official(reference_dir / "checkpoints" / FILES["B"], restore_statistics=restore)
    gold = np.load(reference_dir / "tf_scoremaps.npz")
    expected = gold[f"{crop}_{mode}"]
    found = score(net, as_image(gold[f"{crop}_image"]))[0, 0].numpy()
    # The official 65 x 65 means sum 4,225 values in float32; ours are closer to float64, which
    # differs as much.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5 * expected.max())


def synthetic_image() -> torch.Tensor:
    y, x = np.mgrid[:64, :80]
    return torch.from_numpy((((7 * x + 13 * y + (x * y) % 17) % 256) / 255).astype(np.float32))[
        None, None
    ]


POINTS = ((0, 0), (20, 20), (32, 40), (50, 70), (63, 79))


@pytest.mark.parametrize(
    ("layout", "restore", "smallest", "largest", "at", "mean", "values", "tolerance"),
    [
        (
            "A",
            False,
            116.8009,
            4334.364,
            (17, 41),
            699.400,
            (134.378, 274.772, 432.966, 291.629, 126.609),
            2e-2,
        ),
        (
            "B",
            False,
            0.0,
            73.15627,
            (1, 78),
            5.98803,
            (5.1564, 6.9066, 2.5753, 5.4481, 5.6363),
            1e-4,
        ),
        ("B", True, 0.0, 66.63379, (2, 78), 3.12110, (1.1385, 6.2506, 0.0, 4.1875, 1.4720), 1e-4),
    ],
)
def test_synthetic_image_has_the_values_of_appendix_a1(
    reference_dir, layout, restore, smallest, largest, at, mean, values, tolerance
) -> None:
    net = load_official(reference_dir / "checkpoints" / FILES[layout], restore_statistics=restore)
    found = score(net, synthetic_image())[0, 0]
    assert divmod(int(found.argmax()), 80) == at
    measured = [found.min(), found.max(), found.mean(), *(found[point] for point in POINTS)]
    np.testing.assert_allclose(measured, [smallest, largest, mean, *values], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("key", "restore", "down_levels"),
    [("as_shipped", False, 5), ("full_restore", True, 5), (None, False, 4)],
)
def test_official_mode_equals_the_published_tensorflow_keypoints(
    reference_dir, key, restore, down_levels
) -> None:
    """Appendix A2 (the file published with the code) and both stored extractions: every keypoint,
    scale and score.
    """
    cv2 = pytest.importorskip("cv2")
    folder = reference_dir / "checkpoints"
    image = cv2.cvtColor(cv2.imread(str(folder / "tf_test_im.ppm")), cv2.COLOR_BGR2GRAY)
    file = (
        folder / "tf_test_im.ppm.kpt.npy"
        if key is None
        else reference_dir / "tf_keypoints_graf1.npz"
    )
    gold = np.load(file) if key is None else np.load(file)[key]
    net = load_official(folder / FILES["B"], restore_statistics=restore)
    source = str(folder / "tf_test_im.ppm") if key is None else image  # a file, and its gray levels
    found = build(
        net, None, official=True, num_keypoints=1500, down_levels=down_levels, device="cpu"
    ).extract(source)
    assert len(found) == len(gold)
    made = np.column_stack([found.xy, found.scale, found.score])
    by_place = [
        np.lexsort((rows[:, 0].round(2), rows[:, 1].round(2), rows[:, 2].round(2)))
        for rows in (made, gold)
    ]
    np.testing.assert_allclose(made[by_place[0]][:, :3], gold[by_place[1]][:, :3], atol=1e-3)
    scores = gold[by_place[1]][:, 3]
    np.testing.assert_allclose(made[by_place[0]][:, 3], scores, rtol=3e-4, atol=3e-5 * scores.max())


def test_variant_c_loads_and_scores_a_photograph(reference_dir: Path) -> None:
    net = load_official(reference_dir / "checkpoints" / FILES["C"])
    assert isinstance(net, LegacyKeyNet)
    image = np.load(reference_dir / "keynet_scoremaps.npz")["boat1_crop_image"]
    found = score(net, as_image(image))
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() > 10  # it does respond


def test_variant_c_equals_reference_implementation(reference_dir: Path) -> None:
    """No output of variant C is published; the reference implementation shares no code with the
    network.
    """
    path = reference_dir / "checkpoints" / FILES["C"]
    content = torch.load(path, weights_only=True, map_location="cpu")
    flat = {
        f"{group}.{name}": value
        for group, inner in content.items()
        for name, value in inner.items()
    }
    image = np.load(reference_dir / "keynet_scoremaps.npz")["boat1_crop_image"][:50, 70:131]
    expected = plain_legacy(image, plain_names("C", flat), eps=1e-5)
    found = score(load_official(path), as_image(image))[0, 0]
    assert expected.max() > 1
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-4, atol=2e-5 * float(expected.max())
    )


# ---- tests without the reference folder


@pytest.mark.parametrize(
    ("net", "count"),
    [(KeyNet(), 5873), (LegacyKeyNet.tensorflow(), 5921), (LegacyKeyNet.rekd_port(), 5345)],
)
def test_learnable_parameters(net: torch.nn.Module, count: int) -> None:
    assert sum(p.numel() for p in net.parameters()) == count


def test_blur_kernel_is_appendix_a3() -> None:
    kernel = torch.outer(unnormalized_gaussian_taps(), unnormalized_gaussian_taps())
    np.testing.assert_allclose(
        [kernel[3, 3], kernel[0, 0], kernel.sum()], [0.26596152, 0.00487126, 3.62994], rtol=2e-6
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 40), (70, 66)])
def test_contrast_equals_reference_implementation(size: tuple[int, int]) -> None:
    image = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(normalize_contrast(image[None, None])[0, 0], plain_contrast(image))


def test_level_sizes() -> None:
    assert level_size(240, 600, 1, float32=True) == (
        200,
        500,
    )  # as in the reference maps of TensorFlow
    assert level_size(240, 600, 2, float32=True) == (166, 416)
    assert level_size(180, 324, 2, float32=False) == (125, 225)
    assert level_size(180, 324, 2, float32=True) == (124, 224)
    assert level_size(1, 2, 2, float32=True) == (1, 1)


def test_each_image_is_divided_by_its_own_maximum() -> None:
    images = torch.stack([torch.full((1, 3, 4), 0.25), torch.zeros(1, 3, 4)])
    assert divide_by_maximum(images).amax(dim=(1, 2, 3)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("layout", ["A", "B", "C"])
@pytest.mark.parametrize("ending", ["", ".npz", ".pth"])
def test_random_checkpoint_is_imported_key_by_key(
    layout: str, ending: str, tensors, tmp_path: Path
) -> None:
    path = write(
        layout, tensors[layout], tmp_path / f"weights{ending}"
    )  # detected by content, not by name
    net = load_official(path, restore_statistics=True)
    assert not net.training
    state = net.state_dict()
    if layout == "A":
        ours = {}
        for name in tensors["A"]:
            parts = name.removeprefix("feature_extractor.lb_block.conv").split(".")
            ours[name] = (
                f"last.{parts[-1]}" if parts[0] == "last_conv" else "blocks." + ".".join(parts)
            )
        assert set(ours.values()) == set(state)
        for theirs, name in ours.items():
            torch.testing.assert_close(state[name], tensors["A"][theirs], rtol=0, atol=0)
    else:
        p = plain_names(layout, tensors[layout])
        counters = {name for name in state if name.endswith("num_batches_tracked")}
        assert len(p) == len(state) - (len(counters) if layout == "B" else 0)
        for name, value in p.items():
            part, kind = name.rsplit(".", 1)
            layer = {"last": "last", "bn_last": "last_norm"}.get(part)
            layer = layer or f"blocks.{part[-1]}.{0 if part.startswith('conv') else 1}"
            torch.testing.assert_close(state[f"{layer}.{kind}"], value, rtol=0, atol=0)


@pytest.mark.parametrize(("layout", "eps"), [("B", 1e-3), ("C", 1e-5)])
def test_random_legacy_net_equals_reference_implementation(
    layout: str, eps: float, tensors, tmp_path: Path
) -> None:
    net = load_official(
        write(layout, tensors[layout], tmp_path / "weights"), restore_statistics=True
    ).double()
    image = torch.rand(40, 47, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = plain_legacy(image.numpy(), plain_names(layout, tensors[layout]), eps)
    assert expected.count_nonzero() > expected.numel() / 2
    torch.testing.assert_close(score(net, image[None, None])[0, 0], expected, rtol=1e-6, atol=1e-6)


def test_tensorflow_statistics_are_omitted_as_published(tensors, tmp_path: Path) -> None:
    path = write("B", tensors["B"], tmp_path / "weights.npz")
    published, full = (
        load_official(path).state_dict(),
        load_official(path, restore_statistics=True).state_dict(),
    )
    for name, value in full.items():
        if name.endswith("running_mean"):
            assert not published[name].any()
            assert value.any()
        elif name.endswith("running_var"):
            assert (published[name] == 1).all()
        else:
            torch.testing.assert_close(published[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_round_trip_through_the_official_names(wrapped: bool, tmp_path: Path) -> None:
    net = KeyNet()
    net.initialize(torch.Generator().manual_seed(5))
    official = to_official_state_dict(net)
    assert {name: tuple(value.shape) for name, value in official.items()} == official_shapes()
    torch.save({"state_dict": official} if wrapped else official, tmp_path / "out")
    exported = load_official(tmp_path / "out").state_dict()
    assert set(exported) == set(net.state_dict())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=0)
    official["last_conv.0.bias"] += 1
    assert net.last is not None
    assert net.last.bias.item() == 0  # copies, not views


def test_kornia_with_our_weights_has_the_same_map(tensors, tmp_path: Path) -> None:
    feature = pytest.importorskip("kornia.feature", reason="needs the extra 'interop'")
    net = load_official(write("A", tensors["A"], tmp_path / "weights"))
    assert isinstance(net, KeyNet)
    other = feature.KeyNet(pretrained=False)
    other.load_state_dict(to_official_state_dict(net), strict=True)
    image = torch.rand(2, 1, 90, 101, generator=torch.Generator().manual_seed(6))
    ours, theirs = score(net, image), score(other.eval(), image)
    assert theirs.count_nonzero() > theirs.numel() / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.max()))


def test_only_the_default_network_has_official_names() -> None:
    with pytest.raises(ValueError, match="num_filters=8"):
        to_official_state_dict(KeyNet.tiny())
    with pytest.raises(ValueError, match=r"scale_factor=1\.2"):
        to_official_state_dict(KeyNet(scale_factor=1.5))
    with pytest.raises(ValueError, match="handcrafted='both'"):
        to_official_state_dict(KeyNet(handcrafted="first"))
    with pytest.raises(ValueError, match="LegacyKeyNet"):
        to_official_state_dict(LegacyKeyNet.tensorflow())
    to_official_state_dict(KeyNet(scale_factor=1.2))  # the default value given explicitly


# ---- batches, sizes, values


@pytest.mark.parametrize("layout", ["A", "B", "C"])
def test_batch_equals_single_images(layout: str, tensors, tmp_path: Path) -> None:
    net = load_official(
        write(layout, tensors[layout], tmp_path / "weights"), restore_statistics=True
    )
    images = torch.rand(3, 1, 41, 52, generator=torch.Generator().manual_seed(7))
    images *= torch.tensor([1.0, 0.3, 0.0]).reshape(3, 1, 1, 1)  # different maxima, one black image
    together = score(net, images)
    alone = torch.cat([score(net, image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(alone.max()))


@pytest.mark.parametrize("layout", ["A", "B", "C"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 70), (33, 40)])
def test_tiny_and_odd_sizes(layout: str, size: tuple[int, int], tensors, tmp_path: Path) -> None:
    net = load_official(write(layout, tensors[layout], tmp_path / "weights"))
    for image in (
        torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(8)),
        torch.zeros(1, 1, *size),
    ):
        found = score(net, image)
        assert found.shape == image.shape
        assert found.isfinite().all()
        assert found.min() >= 0


@pytest.mark.parametrize("layout", ["B", "C"])
def test_legacy_nets_are_gain_invariant(layout: str, tensors, tmp_path: Path) -> None:
    net = load_official(write(layout, tensors[layout], tmp_path / "weights"))
    image = torch.rand(1, 1, 35, 38, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(score(net, image / 4), score(net, image))


def test_legacy_net_rejects_color_and_even_filters() -> None:
    with pytest.raises(ValueError, match="gray image"):
        LegacyKeyNet()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="last_kernel"):
        LegacyKeyNet(last_kernel=4)


# ---- invalid files


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_official(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"not weights, but words\n" * 9, b"\x80\x02", b"PK\x03\x04 broken", bytes(500)],
)
def test_unreadable_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        load_official(path)


def test_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="folder"):
        load_official(tmp_path)


@pytest.mark.parametrize("layout", ["A", "B", "C"])
def test_truncated_files(layout: str, tensors, tmp_path: Path) -> None:
    whole = write(layout, tensors[layout], tmp_path / "whole").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(WeightsError, match="cut"):
            load_official(tmp_path / "cut")


class Stowaway:
    """Unpickling it would create a file; reading weights must not do so."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for new in (True, False):
        torch.save(
            {"state_dict": Stowaway(witness)}, tmp_path / "evil", _use_new_zipfile_serialization=new
        )
        with pytest.raises(WeightsError, match="evil"):
            load_official(tmp_path / "evil")
    objects = np.array([Stowaway(witness)], dtype=object)
    np.savez(tmp_path / "evil.npz", **{"model_deep_detector_conv_1/kernel": objects})
    with pytest.raises(WeightsError, match=r"evil\.npz"):
        load_official(tmp_path / "evil.npz")
    assert not witness.exists()


@pytest.mark.parametrize(
    "content", [{"weight": torch.zeros(3)}, {}, {"state_dict": {"a": torch.zeros(1)}}, [1, 2]]
)
def test_weights_of_other_networks_raise(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other")
    with pytest.raises(WeightsError, match=r"other: .*official PyTorch Key\.Net"):
        load_official(tmp_path / "other")


#: Per layout: a kernel, its shape in the file, and one of the same size but with axes in another
#: order.
KERNELS = {
    "A": ("feature_extractor.lb_block.conv0.0.weight", (8, 10, 5, 5), (10, 8, 5, 5)),
    "B": ("model_deep_detector_conv_1/kernel", (5, 5, 10, 8), (8, 10, 5, 5)),
    "C": ("learner.conv_0.weight", (8, 10, 5, 5), (10, 8, 5, 5)),
}


@pytest.mark.parametrize("layout", ["A", "B", "C"])
def test_invalid_tensors_are_named_with_the_expected_shape(
    layout: str, tensors, tmp_path: Path
) -> None:
    name, right, wrong = KERNELS[layout]
    path = tmp_path / "weights"

    def message(**changed: object) -> str:
        content = {k: v for k, v in (tensors[layout] | changed).items() if v is not None}
        with pytest.raises(WeightsError) as caught:
            load_official(write(layout, content, path))
        return str(caught.value)

    assert f"{name}: expected shape {right}, found {wrong}" in message(**{name: torch.zeros(wrong)})
    assert f"{name}: expected shape {right}, found nothing" in message(**{name: None})
    assert f"{name}: expected finite values" in message(**{name: torch.full(right, math.nan)})
    whole = torch.zeros(right, dtype=torch.int64)
    assert f"{name}: expected torch.float32, found torch.int64" in message(**{name: whole})
    assert f"{name}_2: not expected" in message(**{f"{name}_2": torch.zeros(1)})
    assert str(path) in message(**{name: None})
    assert "and 1 more" in message(**dict.fromkeys(list(tensors[layout])[:5]))


def test_unused_statistics_are_checked(tensors, tmp_path: Path) -> None:
    name = "model_deep_detector_batch_final/moving_mean"
    del tensors["B"][name]
    with pytest.raises(WeightsError, match=name):
        load_official(write("B", tensors["B"], tmp_path / "weights"))


# ---- patch descriptors

TRUNK = (
    (32, 1, 3, 3),
    (32, 32, 3, 3),
    (64, 32, 3, 3),
    (64, 64, 3, 3),
    (128, 64, 3, 3),
    (128, 128, 3, 3),
    (128, 128, 8, 8),
)
STATISTICS = ("running_mean", "running_var")
DESCRIPTORS = {"HardNet": HardNet, "SOSNet": SOSNet, "HyNet": HyNet}


def descriptor_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the official files, without the batch counters."""
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "HyNet":
        for layer, shape in enumerate(TRUNK[:6], 1):
            at = 2 if layer == 1 else 0
            channels = shape[0]
            shapes |= {f"layer{layer}.{at}.weight": shape, f"layer{layer}.{at}.bias": (channels,)}
            shapes |= {
                f"layer{layer}.{at + 1}.{name}": (1, channels, 1, 1) for name in ("weight", "bias")
            }
            shapes |= {
                f"layer{layer}.{at + 1}.eps": (1,),
                f"layer{layer}.{at + 2}.tau": (1, channels, 1, 1),
            }
        shapes |= {
            "layer1.0.weight": (1, 1, 1, 1),
            "layer1.0.bias": (1, 1, 1, 1),
            "layer1.0.eps": (1,),
            "layer1.1.tau": (1, 1, 1, 1),
        }
        return (
            shapes
            | {"layer7.1.weight": TRUNK[6]}
            | {f"layer7.2.{name}": (128,) for name in STATISTICS}
        )
    prefix, indices = (
        ("features", (0, 3, 6, 9, 12, 15, 19))
        if kind == "HardNet"
        else ("layers", (1, 4, 7, 10, 13, 16, 20))
    )
    for index, shape in zip(indices, TRUNK, strict=True):
        shapes |= {f"{prefix}.{index}.weight": shape} | {
            f"{prefix}.{index + 1}.{name}": (shape[0],) for name in STATISTICS
        }
    return shapes


def descriptor_tensors(
    kind: str, *, counters: bool = True, seed: int = 11
) -> dict[str, torch.Tensor]:
    """A checkpoint of random numbers of the magnitude of trained ones; every tensor affects the
    result.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in descriptor_shapes(kind).items():
        draw = torch.randn(shape, generator=generator)
        if len(shape) == 4 and shape[-1] > 1:
            made[name] = draw * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("running_var"):
            made[name] = draw.abs() + 0.3
        elif name.endswith("eps"):
            made[name] = draw.abs() * 1e-2
        elif name.endswith("weight"):
            made[name] = 1 + 0.3 * draw
        elif name.endswith("tau"):
            made[name] = 0.5 * draw - 0.5
        else:
            made[name] = 0.2 * draw
        if counters and name.endswith("running_var"):
            made[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return made


def write_descriptor(
    kind: str, tensors: dict[str, torch.Tensor], path: Path, *, bare: bool | None = None
) -> Path:
    """As published: HardNet's file is a dictionary of an epoch and a state dict in the old format;
    the others are state dicts.
    """
    bare = kind != "HardNet" if bare is None else bare
    content = OrderedDict(tensors) if bare else {"epoch": 10, "state_dict": OrderedDict(tensors)}
    torch.save(content, path, _use_new_zipfile_serialization=kind != "HardNet")
    return path


def random_patches() -> torch.Tensor:
    generator = torch.Generator().manual_seed(12)
    patches = torch.rand(24, 1, 32, 32, generator=generator)
    return patches * torch.linspace(0.15, 1, 24)[:, None, None, None]


def real_patches(data_dir: Path) -> torch.Tensor:
    from PIL import Image

    gray = (
        np.asarray(
            Image.open(sorted((data_dir / "oxford" / "graf").glob("*1.p*"))[0]).convert("L")
        ).astype(np.float32)
        / 255
    )
    tiles = torch.from_numpy(gray).unfold(0, 32, 48).unfold(1, 32, 48).reshape(-1, 1, 32, 32)
    return tiles[tiles.flatten(1).std(dim=1) > 0.04]


@pytest.mark.parametrize("kind", list(DESCRIPTORS))
@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("patches_from", ["random", "photograph"])
def test_descriptor_checkpoints_equal_kornia(
    kind, counters, patches_from, request, tmp_path: Path
) -> None:
    feature = pytest.importorskip(
        "kornia.feature", reason="kornia is not installed: pip install 'tiepoints[interop]'"
    )
    patches = (
        random_patches()
        if patches_from == "random"
        else real_patches(request.getfixturevalue("data_dir"))
    )
    assert len(patches) >= 24
    tensors = descriptor_tensors(kind, counters=counters)
    net = load_official(write_descriptor(kind, tensors, tmp_path / "weights.pth"))
    assert type(net) is DESCRIPTORS[kind]
    assert not net.training
    other = getattr(feature, kind)(pretrained=False)
    other.load_state_dict(tensors, strict=counters)
    # kornia expects the range of the published training, ours converts from [0,1]
    theirs = score(other.eval(), patches if kind == "HardNet" else patches * 255)
    ours = score(net, patches)
    assert theirs.std(dim=0).max() > 0.01  # descriptors of different patches differ
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(DESCRIPTORS))
def test_descriptor_checkpoints_round_trip_key_by_key(kind, tmp_path: Path) -> None:
    tensors = descriptor_tensors(kind)
    for bare in (True, False):
        net = load_official(write_descriptor(kind, tensors, tmp_path / "any.name", bare=bare))
        state = net.state_dict()
        assert len(state) == len(tensors)
        exported = to_official_state_dict(net)
        assert set(exported) == set(tensors)
        for name, value in tensors.items():
            torch.testing.assert_close(exported[name], value, rtol=0, atol=0)
        assert sorted(v.double().sum().item() for v in state.values()) == sorted(
            v.double().sum().item() for v in tensors.values()
        )


@pytest.mark.parametrize("kind", list(DESCRIPTORS))
def test_our_untrained_descriptors_run_in_kornia(kind) -> None:
    feature = pytest.importorskip(
        "kornia.feature", reason="kornia is not installed: pip install 'tiepoints[interop]'"
    )
    net = DESCRIPTORS[kind]().eval()
    other = getattr(feature, kind)(pretrained=False)
    other.load_state_dict(to_official_state_dict(net))
    patches = random_patches()
    theirs = score(other.eval(), patches if kind == "HardNet" else patches * 255)
    torch.testing.assert_close(score(net, patches), theirs, rtol=0, atol=1e-5)


def test_fused_descriptors_have_no_official_names() -> None:
    with pytest.raises(ValueError, match="got a FusedPatchNet, which has no official"):
        to_official_state_dict(HardNet().fused())


@pytest.mark.parametrize("kind", list(DESCRIPTORS))
def test_invalid_descriptor_tensors_are_named(kind, tmp_path: Path) -> None:
    tensors = descriptor_tensors(kind)
    name = {
        "HardNet": "features.6.weight",
        "SOSNet": "layers.7.weight",
        "HyNet": "layer3.0.weight",
    }[kind]
    path = tmp_path / "weights.pth"

    def message(**changed: object) -> str:
        content = {k: v for k, v in (tensors | changed).items() if v is not None}
        with pytest.raises(WeightsError) as caught:
            load_official(write_descriptor(kind, content, path))
        return str(caught.value)

    assert f"{name}: expected shape (64, 32, 3, 3), found (32, 64, 3, 3)" in message(
        **{name: torch.zeros(32, 64, 3, 3)}
    )
    assert f"{name}: expected shape (64, 32, 3, 3), found nothing" in message(**{name: None})
    assert f"{name}: expected finite values" in message(
        **{name: torch.full((64, 32, 3, 3), math.inf)}
    )
    assert f"{name}_2: not expected" in message(**{f"{name}_2": torch.zeros(1)})
    statistics = next(n for n in tensors if n.endswith("running_mean"))
    assert f"{statistics}: expected shape" in message(**{statistics: None})
    assert f"does not fit {kind}" in message(**{name: None})
    assert str(path) in message(**{name: None})


@pytest.mark.parametrize(
    ("added", "name"),
    [
        ({"features.0.bias": (32,), "features.1.weight": (32,)}, "HardNetPS"),
        ({"features.1.weight": (32,), "features.1.bias": (32,)}, "HardNetPS"),
        (
            {"features.22.weight": (512, 256, 8, 8), "components": (512, 128), "mean": (512,)},
            "HardNet8",
        ),
        ({"features.1.weight": (32, 1, 7, 7), "descr.0.weight": (128, 4096)}, "TFeat"),
    ],
)
def test_related_networks_raise_with_the_reason(added, name, tmp_path: Path) -> None:
    tensors = descriptor_tensors("HardNet") | {
        name: torch.zeros(shape) for name, shape in added.items()
    }
    with pytest.raises(
        WeightsError,
        match=f"{name}.* another network and not supported.*HardNet, SOSNet and HyNet",
    ):
        load_official(write_descriptor("HardNet", tensors, tmp_path / "weights.pth"))
    with pytest.raises(WeightsError, match="another network"):
        load_official(
            write_descriptor(
                "SOSNet",
                descriptor_tensors("SOSNet") | {"layers.0.weight": torch.zeros(1)},
                tmp_path / "w",
            )
        )
