"""Tracks in videos, sequences and cameras: known motion is followed, failing sources are reported,
outputs can be read.
"""

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiepoints.cli import app
from tiepoints.errors import DataError
from tiepoints.extract import build
from tiepoints.jobs.video import (
    Summary,
    VideoFile,
    VideoFrames,
    Window,
    _median,
    live,
    open_source,
)
from tiepoints.plot import age_color, draw_caption, draw_tracks
from tiepoints.structs import Features, Keypoints
from tiepoints.tracking import Tracker

cv2 = pytest.importorskip("cv2")

SIZE = (160, 120)  # width, height
STEP = (4, -3)  # pixels that the scene moves from frame to frame
FRAMES = 8
FAST = (
    "--detector",
    "keynet-tiny",
    "--descriptor",
    "rootsift",
    "--num-keypoints",
    "60",
    "--device",
    "cpu",
)


# ---- material


def texture(width: int, height: int) -> np.ndarray:
    """(H,W,3) uint8 RGB of boxes of many sizes and colors, slightly blurred, reproducible."""
    rng = np.random.default_rng(7)
    image = np.zeros((height, width, 3), np.uint8)
    for side in np.linspace(60, 8, 400):
        x, y, w, h = (
            int(v) for v in rng.uniform((0, 0, side / 2, side / 2), (width, height, side, side))
        )
        cv2.rectangle(
            image,
            (x - w // 2, y - h // 2),
            (x + w // 2, y + h // 2),
            rng.uniform(0, 255, 3).tolist(),
            -1,
        )
    return cv2.GaussianBlur(image, None, 0.8)


def moving(count: int = FRAMES) -> list[np.ndarray]:
    """Frames (H,W,3) RGB of a scene that moves by STEP per frame."""
    w, h = SIZE
    scene = texture(w + 200, h + 200)
    return [scene[100 - k * STEP[1] :, 100 - k * STEP[0] :][:h, :w] for k in range(count)]


def write_images(folder, frames, suffix=".png"):
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"f{i}{suffix}")  # f10 after f9 only in natural order
    return folder


def write_video(path, frames, rate=12.0):
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, frames[0].shape[1::-1]
    )
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame[:, :, ::-1])
    writer.release()
    return path


def read_video(path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        good, frame = capture.read()
        if not good:
            return frames, capture.get(cv2.CAP_PROP_FPS)
        frames.append(frame)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "moving.avi", moving())


@pytest.fixture(scope="module")
def extractor():
    return build("keynet-tiny", "rootsift", num_keypoints=60, single_scale=True, device="cpu")


def run(*arguments, ok=True):
    done = CliRunner().invoke(app, ["live", *map(str, arguments), *FAST])
    if ok:
        assert done.exit_code == 0, done.output
    return done


def features(xy, names, size=SIZE) -> Features:
    """Keypoints whose descriptors are equal only if their names (small integers) are."""
    xy = torch.tensor(xy, dtype=torch.float32).reshape(-1, 2)
    descriptors = torch.eye(32)[torch.tensor(names, dtype=torch.int64)]
    one = torch.ones(len(xy))
    return Features(Keypoints(xy, one, 0 * one, one), descriptors, size)


class Pictures:
    """A screen that stores the images shown, and that the user closes after some of them."""

    def __init__(self, most=math.inf):
        self.pictures, self.most = [], most

    def show(self, picture):
        self.pictures.append(picture)
        return len(self.pictures) < self.most

    def close(self):
        pass


# ---- the tracker


def test_keypoints_are_linked_by_descriptors_and_ages_are_counted():
    tracker = Tracker(history=2)
    first = tracker.update(features([[10, 10], [50, 50], [90, 20]], [1, 2, 3]))
    assert [t.length for t in first] == [1, 1, 1]
    second = tracker.update(features([[52, 51], [12, 11]], [2, 1]))
    assert second == [first[1], first[0]]
    third = tracker.update(features([[14, 12], [30, 30]], [1, 9]))
    assert third[0] is first[0]
    assert (third[0].length, third[0].age, list(third[0].xy)) == (
        3,
        3,
        [(12.0, 11.0), (14.0, 12.0)],
    )
    assert third[1].length == 1
    assert tracker.lengths() == Counter({3: 1, 2: 1})


def test_no_keypoints_and_one_keypoint():
    none, one = features([], []), features([[5, 6]], [1])
    tracker = Tracker(patience=0)
    assert tracker.update(none) == []
    start = tracker.update(one)
    assert tracker.update(one) == start
    assert start[0].length == 2
    assert tracker.update(none) == []
    assert tracker.update(one) != start
    assert tracker.lengths() == Counter({2: 1})


@pytest.mark.parametrize(
    ("patience", "gap", "survives"), [(0, 1, False), (1, 1, True), (1, 2, False), (2, 2, True)]
)
def test_track_survives_missing_frames_up_to_patience(patience, gap, survives):
    tracker = Tracker(patience=patience)
    here, away = features([[20, 20], [70, 70]], [1, 2]), features([[71, 70]], [2])
    tracker.update(here)
    track = tracker.update(here)[0]
    for _ in range(gap):
        tracker.update(away)
    track_after = tracker.update(here)[0]
    assert (track_after is track) == survives
    if survives:
        assert (track.length, track.age) == (3, 3 + gap)
    assert tracker.lengths()[3 if survives else 2] == 1


def test_maximum_motion_scales_with_missing_frames():
    diagonal = math.hypot(*SIZE)  # 200
    for far, linked in ((0.09, True), (0.11, False)):
        tracker = Tracker(max_motion=0.1)
        track = tracker.update(features([[10, 10]], [1]))[0]
        assert (tracker.update(features([[10 + far * diagonal, 10]], [1]))[0] is track) == linked
    tracker = Tracker(max_motion=0.1, patience=1)
    for x in (10, 10):
        track = tracker.update(features([[x, 10]], [1]))[0]
    tracker.update(features([], []))
    assert tracker.update(features([[10 + 0.19 * diagonal, 10]], [1]))[0] is track


def test_ratio_test_rejects_ambiguous_keypoints():
    """Two descriptors of the second frame have similar distances to the one of the first."""
    first, second = features([[10, 10]], [0]), features([[10, 10], [30, 30]], [0, 1])
    twins = torch.zeros(2, 32)
    twins[:, 0], twins[0, 1], twins[1, 2] = 0.95, 0.31, 0.312
    second = Features(second.keypoints, torch.nn.functional.normalize(twins, dim=1), SIZE)
    for ratio, linked in ((None, True), (0.9, False)):
        tracker = Tracker(ratio=ratio)
        tracker.update(first)
        assert any(t.length == 2 for t in tracker.update(second)) == linked


def test_change_of_frame_size_ends_all_tracks():
    tracker = Tracker()
    for size in (SIZE, SIZE, (80, 60), (80, 60), (80, 60)):
        tracks = tracker.update(features([[10, 10]], [1], size))
    assert tracks[0].length == 3
    assert tracker.lengths() == Counter({2: 1, 3: 1})


@pytest.mark.parametrize(
    "options", [{"ratio": 0}, {"ratio": 1.5}, {"max_motion": 0}, {"patience": -1}, {"history": 0}]
)
def test_invalid_tracker_options_raise(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Tracker(**options)


def test_features_without_descriptors_raise():
    with pytest.raises(ValueError, match="descriptor"):
        Tracker().update(Features(Keypoints.empty(), None, SIZE))


@pytest.mark.parametrize("lengths", [[2], [2, 5], [2, 2, 3, 9], [4, 2, 2, 2, 7]])
def test_median_of_counts_equals_median_of_the_list(lengths):
    assert _median(Counter(lengths)) == np.median(lengths)


# ---- known motion through the networks


def test_tracks_follow_a_known_motion_within_a_pixel(video, extractor):
    tracker, frames = Tracker(history=None), open_source(str(video))
    for frame in frames:
        tracks = tracker.update(extractor.extract(frame.image))
    frames.close()
    long = [t for t in tracks if t.length >= 4]
    assert len(long) >= 10
    error = np.array(
        [math.dist(t.xy[-1], np.add(t.xy[0], np.multiply(t.age - 1, STEP))) for t in long]
    )
    assert np.median(error) < 0.5
    assert (error < 1).mean() > 0.9


def test_default_sobelnet_and_desnet_follow_known_motion(video, tmp_path):
    out = tmp_path / "out.avi"
    done = CliRunner().invoke(
        app,
        [
            "live",
            str(video),
            "--output",
            str(out),
            "--json",
            "--device",
            "cpu",
            "--num-keypoints",
            "60",
        ],
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["frames"] == FRAMES == len(read_video(out)[0])
    assert summary["tracks"] > 10
    assert summary["median_length"] >= 4


def test_tracks_of_real_frames_agree_with_the_camera_motion(data_dir, extractor, tmp_path):
    folder = data_dir / "sequence"
    if not folder.is_dir():
        pytest.skip("no sequence of frames (../shared/data/sequence)")
    names = sorted(str(p) for p in folder.glob("*.png"))[:3]
    clip = write_video(
        tmp_path / "real.avi",
        [np.asarray(Image.open(n).convert("RGB").resize((320, 240))) for n in names],
    )
    screen, frames = Pictures(), open_source(str(clip))
    tracker = Tracker(history=None)
    summary = live(frames, extractor, screen, tracker=tracker)
    assert (summary.frames, len(screen.pictures)) == (3, 3)
    moves = np.array([np.subtract(t.xy[-1], t.xy[0]) for t in tracker._tracks if t.length == 3])
    assert len(moves) >= 10
    apart = np.linalg.norm(moves - np.median(moves, axis=0), axis=1)
    assert np.median(apart) < 12  # the camera rotates: most of the scene moves similarly


# ---- sources


def test_video_folder_pattern_and_files_have_the_same_frames(video, tmp_path):
    frames = moving(12)
    folder = write_images(tmp_path / "frames", frames)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._f0.png").write_bytes(b"macOS")
    for given in (str(folder), str(folder / "*.png"), [str(p) for p in folder.glob("f*.png")]):
        source = open_source(given)
        read = list(source)
        assert (len(read), source.total, source.skipped) == (12, 12, [])
        assert all(
            np.array_equal(a.picture[:, :, ::-1], b) for a, b in zip(read, frames, strict=True)
        )
    assert read[0].image.shape == (1, 1, 120, 160)
    source = open_source(str(video))
    assert (source.total, source.rate) == (FRAMES, 12)
    for read, frame in zip(source, frames, strict=False):
        assert (
            np.abs(read.picture[:, :, ::-1].astype(int) - frame).mean() < 10
        )  # JPEG; the next frame differs by 30
        gray = read.picture[:, :, ::-1] @ [0.299, 0.587, 0.114] / 255
        assert np.abs(read.image[0, 0].numpy() - gray).max() < 0.01
    source.close()


def test_every_nth_frame(video, tmp_path):
    frames = moving(7)
    read = list(open_source(str(write_images(tmp_path / "frames", frames)), every=3))
    assert [
        next(k for k, f in enumerate(frames) if np.array_equal(f, r.picture[:, :, ::-1]))
        for r in read
    ] == [0, 3, 6]
    source = open_source(str(video), every=3)
    assert (source.total, source.rate) == (3, 4)
    read = list(source)
    source.close()
    differences = [
        [np.abs(r.picture[:, :, ::-1].astype(int) - f).mean() for f in moving()] for r in read
    ]
    assert [int(np.argmin(d)) for d in differences] == [0, 3, 6]


def test_frames_of_16_bit_and_gray_keep_their_contrast(tmp_path):
    ramp = np.linspace(0, 65535, 160 * 120).reshape(120, 160).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray((ramp // 257).astype(np.uint8)).save(tmp_path / "b.png")
    deep, gray = open_source(str(tmp_path))
    assert deep.picture.shape == gray.picture.shape == (120, 160, 3)
    assert np.abs(deep.picture.astype(int) - gray.picture).max() <= 1


@pytest.mark.parametrize(
    ("make", "given", "says"),
    [
        (None, "nothing.mp4", "give a video"),
        (None, "frames/*.png", "give a video"),
        ("folder", "source", "no image in the folder"),
        ("text", "source.avi", "convert it"),
        ("empty", "source.mp4", "convert it"),
        ("image", "source.png", "'*.png'"),
        (None, "987", "camera 987 does not open"),
        (None, "99999999999999", "does not open"),
    ],
)
def test_missing_and_damaged_sources_raise(tmp_path, make, given, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    match make:
        case "folder":
            (tmp_path / given).mkdir()
        case "text":
            (tmp_path / given).write_text("this is not a video\n" * 50)
        case "empty":
            (tmp_path / given).touch()
        case "image":
            Image.fromarray(moving(1)[0]).save(tmp_path / given)
    done = run(given, "--output", "out.avi", ok=False)
    assert done.exit_code == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert given in error
    assert says in error
    assert not list(tmp_path.glob("*out*"))


def test_video_among_files_and_folder_of_damaged_images_raise(video, tmp_path):
    folder = write_images(tmp_path / "frames", moving(2))
    with pytest.raises(ValueError, match=r"moving\.avi is not an image"):
        open_source([str(folder / "f0.png"), str(video)])
    for i in range(2):
        (folder / f"f{i}.png").write_bytes(b"nonsense")
    done = run(folder, "--output", tmp_path / "out.avi", ok=False)
    assert done.exit_code == 2
    assert "none of the 2 images" in done.stderr
    assert "f0.png" in done.stderr


def test_truncated_video_is_reported_and_output_is_valid(video, tmp_path):
    whole = video.read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    done = run(cut, "--output", tmp_path / "out.mp4", "--json", ok=False)
    assert done.exit_code == 1
    assert "is truncated" in done.stderr
    assert str(cut) in done.stderr
    summary = json.loads(done.stdout)
    assert 2 <= summary["frames"] < FRAMES - 2
    assert "is truncated" in summary["failure"]
    assert len(read_video(tmp_path / "out.mp4")[0]) == summary["frames"]


def test_damaged_image_in_a_folder_is_skipped_and_named(tmp_path):
    folder = write_images(tmp_path / "frames", moving(5))
    good = (folder / "f2.png").read_bytes()
    (folder / "f2.png").write_bytes(good[: len(good) // 2])
    done = run(folder, "--output", tmp_path / "out.avi", ok=False)
    assert done.exit_code == 1
    assert "f2.png" in done.stderr
    assert "\r" not in done.stderr  # no bar without a terminal
    assert "frames     4" in done.stdout
    assert len(read_video(tmp_path / "out.avi")[0]) == 4


class FakeCamera:
    """A camera that is disconnected after a few images."""

    def __init__(self, frames, fps=0.0):
        self.frames, self.fps, self.at, self.settings = frames, fps, -1, {}

    def isOpened(self):
        return True

    def get(self, what):
        return self.fps if what == cv2.CAP_PROP_FPS else -1.0

    def set(self, what, value):
        self.settings[what] = value

    def grab(self):
        time.sleep(0.05)
        self.at += 1
        return self.at < len(self.frames)

    def retrieve(self):
        return True, np.ascontiguousarray(self.frames[self.at][:, :, ::-1])

    def release(self):
        self.at = len(self.frames)


def test_disconnected_camera_is_reported_and_its_video_keeps_real_time(
    tmp_path, extractor, monkeypatch
):
    camera, opened = FakeCamera(moving(6)), cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda index: camera if index == 0 else opened(index))
    source = open_source("0")
    assert isinstance(source, VideoFrames)
    assert (source.camera, source.total, source.rate) == (True, None, 25)
    assert camera.settings == {cv2.CAP_PROP_BUFFERSIZE: 1}
    screen = VideoFile(tmp_path / "out.avi", 100.0, live=True)
    summary = live(source, extractor, screen)
    screen.close()
    assert "camera 0 returned no more images" in summary.failure
    assert summary.frames == 6
    frames = read_video(tmp_path / "out.avi")[0]
    assert 100 * 5 * 0.05 <= len(frames) <= 100 * summary.seconds + 1


# ---- drawings


def test_tails_heads_and_single_keypoints_are_drawn_at_their_positions():
    black = np.zeros((120, 160, 3), np.uint8)
    tracker = Tracker(history=3)
    for x in (20, 40, 60, 80):
        tracks = tracker.update(features([[x, 30]], [1]))
    assert [list(t.xy) for t in tracks] == [[(40.0, 30.0), (60.0, 30.0), (80.0, 30.0)]]
    loose = tracker.update(features([[100, 90]], [5]))
    out = draw_tracks(black, tracks + loose)
    assert not black.any()
    assert tuple(out[30, 80]) == age_color(4)
    assert np.allclose(out[30, 50], age_color(4), atol=30)  # lines are smoothed
    assert not out[30, :38].any()  # beyond the tail
    assert out[90, 100].min() > 150  # light gray and small
    assert (
        (out[85:96, 95:106].max(axis=2) > 60).sum()
        <= 9
        < (out[25:36, 75:86].max(axis=2) > 60).sum()
    )
    assert np.array_equal(draw_tracks(black, []), black)


def test_colors_show_the_age_and_caption_is_in_the_corner():
    colors = [age_color(a) for a in (1, 4, 16, 64)]
    assert len(set(colors)) == 4
    assert colors[0][0] > 200 > colors[0][2]  # blue
    assert colors[-1][2] > 200 > colors[-1][0]  # red
    assert age_color(1000) == colors[-1]
    picture = np.full((480, 640, 3), 200, np.uint8)
    draw_caption(picture, "12.5 frames/s   31 tracks")
    assert (picture[:20, :100] != 200).any()
    assert (picture[100:] == 200).all()
    assert (picture[:, 400:] == 200).all()
    draw_caption(np.zeros((4, 4, 3), np.uint8), "in a picture smaller than itself")


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_written_video_has_frames_rate_and_tracks(video, tmp_path, suffix):
    out = tmp_path / "new" / f"out{suffix}"
    done = run(video, "--output", out, "--json", "--max-frames", 5)
    summary = json.loads(done.stdout)
    frames, rate = read_video(out)
    assert summary["frames"] == len(frames) == 5
    assert rate == 12
    assert summary["output"] == str(out)
    assert frames[0].shape == (120, 160, 3)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    drawn = [
        np.abs(a.astype(int) - b[:, :, ::-1])[40:] for a, b in zip(frames, moving(5), strict=True)
    ]
    assert np.mean(drawn[4] > 60) > 2 * np.mean(drawn[0] > 60)  # tails start at the second frame
    assert set(summary) == {*Summary.__dataclass_fields__, "output"}
    assert 10 < summary["points"] <= 60
    assert summary["tracks"] >= 10
    assert 2 <= summary["median_length"] <= 5
    assert 2 <= summary["mean_length"] <= 5
    assert summary["frames_per_second"] > 0
    assert not summary["stopped"]


def test_change_of_frame_size_keeps_the_size_of_the_video(tmp_path):
    frames = moving(6)
    frames[3:] = [f[:90, :100] for f in frames[3:]]
    folder = write_images(tmp_path / "frames", frames)
    done = run(folder, "--output", tmp_path / "out.avi", "--json")
    written = read_video(tmp_path / "out.avi")[0]
    assert [f.shape for f in written] == [(120, 160, 3)] * 6
    assert json.loads(done.stdout)["mean_length"] <= 3


def test_invalid_outputs_raise_before_any_work(video, tmp_path):
    done = run(video, "--output", tmp_path / "out.gif", ok=False)
    assert (done.exit_code, "out.gif" in done.stderr, ".mp4" in done.stderr) == (2, True, True)
    assert run(video, "--output", video, ok=False).exit_code == 2
    assert len(read_video(video)[0]) == FRAMES
    (tmp_path / "folder.avi").mkdir()
    assert "is a folder" in run(video, "--output", tmp_path / "folder.avi", ok=False).stderr
    assert (
        "--descriptor must not be none"
        in CliRunner().invoke(app, ["live", str(video), "--descriptor", "none"]).stderr
    )
    screen = VideoFile(tmp_path / "two.avi", 10)
    screen.show(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="32 x 32"):
        screen.show(np.zeros((32, 48, 3), np.uint8))
    screen.close()
    assert len(read_video(tmp_path / "two.avi")[0]) == 1
    empty = VideoFile(tmp_path / "none.avi", 10)
    empty.close()
    assert not (tmp_path / "none.avi").exists()


# ---- window and quitting


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the display is not known by the environment"
)
def test_missing_display_raises(video, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    done = run(video, ok=False)
    assert done.exit_code == 2
    assert "--output" in done.stderr


def test_opencv_without_windows_raises(monkeypatch):
    def refuse(*_):
        raise cv2.error(
            "The function is not implemented. Rebuild the library with Windows, GTK+ 2.x or Cocoa "
            "support."
        )

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", refuse)
    with pytest.raises(DataError, match="--output"):
        Window()


@pytest.mark.parametrize(
    ("key", "visible", "goes_on"),
    [(255, 1, True), (ord("q"), 1, False), (27, 1, False), (255, 0, False)],
)
def test_keys_and_closing_quit_the_window(monkeypatch, key, visible, goes_on):
    shown, waits = [], []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda ms: waits.append(ms) or key)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: visible)
    window = Window(rate=2.0)
    picture = np.zeros((4, 4, 3), np.uint8)
    assert window.show(picture) == goes_on
    window.show(picture)
    assert len(shown) == 2
    assert waits[0] == 1
    assert 300 < waits[1] <= 500  # the second image is due half a second after the first


def test_user_quits_by_the_window_and_by_ctrl_c(video, extractor):
    source = open_source(str(video))
    summary = live(source, extractor, Pictures(most=3))
    source.close()
    assert (summary.frames, summary.stopped, summary.failure) == (3, True, "")

    class Interrupted(Pictures):
        def show(self, picture):
            super().show(picture)
            if len(self.pictures) == 4:
                raise KeyboardInterrupt
            return True

    source = open_source(str(video))
    summary = live(source, extractor, Interrupted())
    source.close()
    assert (summary.frames, summary.stopped) == (
        3,
        True,
    )  # the interrupted one is not counted
    assert summary.tracks >= 10


def test_ctrl_c_prints_the_summary_and_leaves_a_valid_video(tmp_path):
    # a shell starts background processes with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = write_images(tmp_path / "frames", moving(2))
    for i in range(2, 1000):
        os.link(folder / f"f{i % 2}.png", folder / f"f{i}.png")

    def interrupt():
        until = time.monotonic() + 60
        while not list(tmp_path.glob(".out.*.avi")) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    try:
        done = run(folder, "--output", tmp_path / "out.avi")
        killer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "(stopped)" in done.stdout
    written, reported = len(read_video(tmp_path / "out.avi")[0]), int(done.stdout.split()[1])
    assert (
        1 <= reported <= written <= reported + 1 < 1000
    )  # the last one may be written but not counted yet
    assert not list(tmp_path.glob(".out.*"))


def test_missing_opencv_is_named_and_not_needed_to_import(video, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "tiepoints.jobs.video")
    importlib.import_module("tiepoints.jobs.video")
    done = run(video, "--output", "out.avi", ok=False)
    assert done.exit_code == 2
    assert "pip install 'tiepoints[opencv]'" in done.stderr
