"""Subpixel refinement: known warps recovered from displaced keypoints, consistent tracks."""

import dataclasses
import math

import pytest
import torch

import tiepoints
from tiepoints.filters import gaussian_blur
from tiepoints.geometry import warp_image, warp_points
from tiepoints.pyramid import build_pyramid
from tiepoints.refine import align, refine_matches, refine_tracks
from tiepoints.structs import Features, Keypoints, Matches


def textured(height: int = 200, width: int = 240, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed)) - 0.5
    image = sum(gaussian_blur(noise, sigma) * sigma for sigma in (2.0, 4.0))
    return (0.5 + image / (6 * image.std())).clamp(0, 1)


def keypoints(xy: torch.Tensor, scale: float = 1.0, angle: float = 0.0) -> Keypoints:
    n = len(xy)
    return Keypoints(xy.float(), torch.full((n,), scale), torch.full((n,), angle), torch.ones(n))


def grid_points() -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(60.0, 180, 20), torch.arange(60.0, 140, 20))


def similarity(
    angle: float,
    zoom: float,
    shift: tuple[float, float],
    about: tuple[float, float] = (119.5, 99.5),
) -> torch.Tensor:
    c, s = zoom * math.cos(angle), zoom * math.sin(angle)
    x, y = about
    return torch.tensor(
        [[c, -s, x - c * x + s * y + shift[0]], [s, c, y - s * x - c * y + shift[1]], [0, 0, 1]],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(
    ("angle", "zoom", "shift"),
    [
        (0.0, 1.0, (0.37, -0.81)),
        (0.15, 1.1, (1.3, 0.4)),
        (1.9, 1.0, (0.5, 0.5)),
        (0.0, 0.6, (0.0, 0.0)),
    ],
)
def test_displaced_keypoints_are_refined_to_their_positions(angle, zoom, shift):
    a = textured()
    H = similarity(angle, zoom, shift)
    # the second view is low-pass filtered if it is smaller, as by a camera
    b = warp_image(gaussian_blur(a, 0.5 * math.sqrt(max(0.0, zoom**-2 - 1))), H[None].float())
    truth = warp_points(grid_points().double(), H).float()
    missed = truth + 0.8 * (
        2 * torch.rand(len(truth), 2, generator=torch.Generator().manual_seed(1)) - 1
    )
    known_turn = angle if abs(angle) > 0.5 else 0.0  # small rotations are left to the alignment
    found = align(
        build_pyramid(a),
        keypoints(grid_points(), 1.5),
        build_pyramid(b),
        keypoints(missed, 1.5 * zoom, known_turn),
    )
    error = (found.xy - truth).norm(dim=1)
    assert found.accepted.float().mean() > 0.9
    assert float(error.median()) < 0.08
    assert float(error.median()) < 0.15 * float((missed - truth).norm(dim=1).median())
    assert float(found.correlation[found.accepted].min()) > 0.6


def test_single_keypoint_is_aligned_as_in_a_batch():
    a = textured()
    b = warp_image(a, similarity(0.1, 1.05, (0.6, 0.3))[None].float())
    xy = warp_points(grid_points().double(), similarity(0.1, 1.05, (0.2, 0.9))).float()
    scales = torch.linspace(0.8, 3.0, len(xy))
    all_a, all_b = (dataclasses.replace(keypoints(at), scale=scales) for at in (grid_points(), xy))
    pyramids = build_pyramid(a), build_pyramid(b)
    together = align(pyramids[0], all_a, pyramids[1], all_b)
    for i in (0, 7, len(xy) - 1):
        alone = align(pyramids[0], all_a[torch.tensor([i])], pyramids[1], all_b[torch.tensor([i])])
        torch.testing.assert_close(alone.xy[0], together.xy[i], rtol=0, atol=1e-3)


def test_keypoints_that_cannot_be_aligned_are_unchanged():
    flat = torch.full((1, 1, 80, 90), 0.4)
    other = textured(80, 90, seed=5)
    edge = torch.tensor([[0.0, 0.0], [89.0, 79.0], [45.0, 40.0], [-3.0, 200.0]])
    for a, b in ((flat, flat), (flat, other), (other, flat)):
        found = align(
            build_pyramid(a), keypoints(edge, 2.0), build_pyramid(b), keypoints(edge, 2.0)
        )
        assert torch.isfinite(found.xy).all()
        assert torch.isfinite(found.correlation).all()
        assert not found.accepted.any()
        assert torch.equal(found.xy, edge)
    none = align(build_pyramid(flat), keypoints(edge[:0]), build_pyramid(flat), keypoints(edge[:0]))
    assert none.xy.shape == (0, 2)
    with pytest.raises(ValueError, match="matched keypoints"):
        align(build_pyramid(flat), keypoints(edge), build_pyramid(flat), keypoints(edge[:2]))


def test_match_refines_if_images_are_given():
    a = textured()
    H = similarity(0.0, 1.0, (7.4, -3.3))
    b = warp_image(a, H[None].float(), padding="reflection")
    extractor = tiepoints.build(
        "keynet-tiny", "hardnet", num_keypoints=150, device="cpu", single_scale=True
    )
    one, two = extractor.extract(a[0, 0]), extractor.extract(b[0, 0])
    plain = tiepoints.match(one, two)
    found = tiepoints.match(one, two, refine=True, images=(a[0, 0], b[0, 0]))
    assert torch.equal(found.index, plain.index)
    assert plain.xy_b is None
    errors = []
    for matches in (plain, found):
        xy_a, xy_b = matches.positions(one, two)
        error = (warp_points(xy_a.double(), H).float() - xy_b).norm(dim=1)
        errors.append(float(error[error < 3].mean()))
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ValueError, match="images="):
        tiepoints.match(one, two, refine=True)
    with pytest.raises(ValueError, match="its features are of"):
        tiepoints.match(one, two, refine=True, images=(a[0, 0], b[0, 0, :100]))
    nothing = one[torch.zeros(0, dtype=torch.int64)]
    assert len(tiepoints.match(nothing, two, refine=True, images=(a[0, 0], b[0, 0]))) == 0
    chosen = found[torch.arange(len(found)) % 2 == 0]
    assert torch.equal(chosen.xy_b, found.xy_b[::2])


def test_tracks_have_one_position_per_image():
    base = textured()
    moves = {"a": (0.0, 0.0), "b": (3.3, 1.7), "c": (-2.6, 4.4)}
    images = {
        name: warp_image(base, similarity(0, 1, move)[None].float(), padding="reflection")
        for name, move in moves.items()
    }
    generator = torch.Generator().manual_seed(2)
    features = {}
    for name, move in moves.items():
        missed = (
            torch.zeros(1)
            if name == "a"
            else torch.rand(len(grid_points()), 2, generator=generator) - 0.5
        )
        features[name] = keypoints(grid_points() + torch.tensor(move) + missed)
    features["a"] = dataclasses.replace(
        features["a"], scale=0.9 * features["a"].scale
    )  # the reference of every track
    index = torch.arange(len(grid_points()) - 1)
    pairs = ("a", "b"), ("b", "c"), ("a", "c")
    matches = {pair: torch.stack([index, index], dim=1) for pair in pairs}
    asked = []

    def image(name):
        asked.append(name)
        return images[name][0, 0]

    positions = refine_tracks(features, matches, image)
    assert torch.equal(positions["a"], features["a"].xy)
    for name in ("b", "c"):
        truth = grid_points() + torch.tensor(moves[name])
        before, after = (
            (xy - truth).norm(dim=1)[:-1].mean() for xy in (features[name].xy, positions[name])
        )
        assert float(after) < 0.25 * float(before)
        assert torch.equal(positions[name][-1], features[name].xy[-1])  # it has no track
    assert sorted(set(asked)) == ["a", "b", "c"]


def test_tracks_of_large_images_are_aligned_as_exactly_as_pairs():
    """Of an image that was reduced to detect coarse keypoints, too, the fine levels are used."""
    base = textured(400, 480)
    images = (base, warp_image(base, similarity(0, 1, (6.3, -3.8))[None].float()))
    a = keypoints(2 * grid_points(), scale=2.5)
    b = keypoints(2 * grid_points() + torch.tensor([6.8, -4.2]), scale=2.6)
    index = torch.arange(len(a))[:, None].expand(-1, 2)
    pair = refine_matches(
        Features(a, None, (480, 400)),
        Features(b, None, (480, 400)),
        Matches(index, torch.ones(len(a))),
        (images[0][0, 0], images[1][0, 0]),
    )
    views = dict(zip("ab", images, strict=True))
    tracks = refine_tracks({"a": a, "b": b}, {("a", "b"): index}, lambda name: views[name][0, 0])
    torch.testing.assert_close(tracks["b"], pair.xy_b, atol=1e-4, rtol=0)
    assert not torch.equal(tracks["b"], b.xy)


def test_tracks_of_rotated_images_are_aligned():
    """Keypoints are upright: the matches tell how far the cameras are rotated."""
    base = textured()
    H = similarity(0.9, 0.9, (3.0, -2.0))
    views = {"a": base, "b": warp_image(base, H[None].float())}
    truth = warp_points(grid_points().double(), H).float()
    inside = ((truth > 12) & (truth < torch.tensor([228.0, 188.0]))).all(dim=1)
    a = keypoints(grid_points()[inside])
    missed = torch.rand(len(a), 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = keypoints(truth[inside] + missed)
    index = torch.arange(len(a))[:, None].expand(-1, 2)
    refined = refine_tracks({"a": a, "b": b}, {("a", "b"): index}, lambda name: views[name][0, 0])
    errors = (refined["b"] - truth[inside]).norm(dim=1)
    assert len(a) > 20
    assert float(errors.median()) < 0.1
    upright = align(build_pyramid(views["a"]), a, build_pyramid(views["b"]), b)
    assert float(upright.accepted.float().mean()) < 0.5


def test_keypoints_of_one_place_get_one_position():
    """Those of two scales, which matches connect with each other."""
    base = textured()
    views = {"a": base, "b": warp_image(base, similarity(0, 1, (3.0, 2.0))[None].float())}
    points = grid_points()
    n = len(points)
    a = keypoints(torch.cat([points, points + 0.8]))
    a = dataclasses.replace(a, scale=torch.cat([torch.ones(n), 1.4 * torch.ones(n)]))
    b = keypoints(points + torch.tensor([3.6, 1.5]))
    rows = torch.arange(n)
    # the keypoint of b matches that of the first scale, which was matched with the second one
    matches = {
        ("a", "b"): torch.stack([rows, rows], dim=1),
        ("b", "c"): torch.stack([rows, rows], dim=1),
        ("a", "c"): torch.stack([rows + n, rows], dim=1),
    }
    features, images = {"a": a, "b": b, "c": b}, {**views, "c": views["b"]}
    refined = refine_tracks(features, matches, lambda name: images[name][0, 0])
    first, second = refined["a"].split(n)
    assert float((first - second).norm(dim=1).median()) < 0.1
    assert float((refined["b"] - first - torch.tensor([3.0, 2.0])).norm(dim=1).median()) < 0.1


@pytest.mark.parametrize("camera", ["single", "per-image"])
def test_database_is_refined_and_verified_again(tmp_path, monkeypatch, camera):
    pytest.importorskip("pycolmap")
    from PIL import Image

    from tiepoints.formats.colmap import ColmapDatabase
    from tiepoints.jobs.match import refine_database

    base = textured()
    H = similarity(0.05, 1.0, (4.4, -2.7))
    views = {"a.png": base, "b.png": warp_image(base, H[None].float(), padding="reflection")}
    files = {}
    for name, view in views.items():
        files[name] = tmp_path / name
        Image.fromarray((view[0, 0] * 255).round().byte().numpy()).save(files[name])
    truth = warp_points(grid_points().double(), H).float()
    missed = truth + 0.7 * (
        2 * torch.rand(len(truth), 2, generator=torch.Generator().manual_seed(3)) - 1
    )
    descriptors = torch.nn.functional.normalize(torch.rand(len(truth), 16) - 0.5, dim=1)
    index = torch.arange(len(truth))
    pairs = [("a.png", "b.png")]
    with ColmapDatabase(tmp_path / "x.db", camera=camera, write=True) as database:
        for name, xy, scale in (("a.png", grid_points(), 1.0), ("b.png", missed, 1.1)):
            database.write(name, Features(keypoints(xy, scale), descriptors, (240, 200)))
        database.write_matches(
            "a.png", "b.png", Matches(torch.stack([index, index], 1), torch.ones(len(index)))
        )
        database.write("c.png", Features(keypoints(truth, 1.0), descriptors, (240, 200)))
        unverified = ("a.png", "c.png")
        database.write_matches(*unverified, Matches(index[:3, None].repeat(1, 2), torch.ones(3)))
        files["c.png"] = files["a.png"]
        pairs.append(unverified)
        assert database.verify(pairs) == 1
        forgotten = []
        forget = database.forget_geometry
        monkeypatch.setattr(
            database, "forget_geometry", lambda given: forgotten.extend(given) or forget(given)
        )
        verify, among = database.verify, []

        def recorded(*args, **options):
            among.append(options["among"])
            return verify(*args, **options)

        monkeypatch.setattr(database, "verify", recorded)
        assert refine_database(database, pairs, files) == 1
        # only the inliers, if the images share a camera
        assert set(among[0]) == (set(forgotten) if camera == "single" else set())
        assert forgotten == [("a.png", "b.png")]  # the other one has no geometry to verify again
        moved = database.read("b.png")
        torch.testing.assert_close(database.read("a.png").xy, grid_points())
        assert float((moved.xy - truth).norm(dim=1).mean()) < 0.3 * float(
            (missed - truth).norm(dim=1).mean()
        )
        assert torch.equal(moved.scale, torch.full((len(truth),), 1.1))
        assert len(database.read_inliers("a.png", "b.png")) == len(truth)
        with pytest.raises(tiepoints.DataError, match="keypoints, got"):
            database.move_keypoints("a.png", truth[:3])


def test_coarse_keypoints_are_aligned_at_a_finer_scale(monkeypatch):
    a = textured()
    H = similarity(0.03, 1.0, (0.4, -0.7))
    noise = 0.1 * torch.randn(2, *a.shape, generator=torch.Generator().manual_seed(5))
    views = a + noise[0], warp_image(a, H[None].float()) + noise[1]
    # another depth around every point: only near to it the views fit
    truth = warp_points(grid_points().double(), H).float()
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(240.0), indexing="ij")
    near = (torch.cdist(torch.stack([x, y], -1).reshape(-1, 2), truth).min(dim=1).values < 9).view(
        200, 240
    )
    b = torch.where(near, views[1], views[1].roll(2, dims=-1))
    given = keypoints(grid_points(), 2.0), keypoints(truth + 0.4, 2.0)
    pyramids = build_pyramid(views[0]), build_pyramid(b)

    def error() -> float:
        found = align(pyramids[0], given[0], pyramids[1], given[1])
        return float((found.xy - truth).norm(dim=1).median())

    both = error()
    monkeypatch.setattr("tiepoints.refine.FINE_FACTOR", 1.0)
    assert both < 0.7 * error()


def test_refinement_needs_features_of_these_images():
    a = textured(60, 80)
    features = Features(keypoints(torch.tensor([[30.0, 30.0]])), torch.ones(1, 4) / 2, (80, 60))
    matches = Matches(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1))
    found = refine_matches(features, features, matches, (a[0, 0], a[0, 0]))
    torch.testing.assert_close(found.xy_b, features.xy, rtol=0, atol=0.02)
    assert found.score is matches.score
