"""The training loop: convergence, reproducibility, interruptions, and messages."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from tiepoints.errors import WeightsError
from tiepoints.geometry import warp_image
from tiepoints.models.keynet import KeyNet
from tiepoints.training import loop
from tiepoints.training.loop import (
    FitSettings,
    RunOptions,
    Task,
    Trainer,
    learning_rate_at,
    read_checkpoint,
    save_atomically,
)
from tiepoints.training.losses import msip_loss

pytest.importorskip("lightning")

STEPS = 9
BREAK = 6
SETTINGS = FitSettings(
    steps=STEPS,
    batch_size=2,
    learning_rate=5e-3,
    warmup=2,
    validate_every=3,
    average=0.9,
)


def one_pair(index: int, size: int = 64) -> dict[str, torch.Tensor]:
    """Smooth noise and its copy shifted by a few pixels; depends only on ``index``."""
    generator = torch.Generator().manual_seed(index)
    noise = torch.rand(1, 1, size + 4, size + 4, generator=generator)
    image = torch.nn.functional.avg_pool2d(noise, 5, 1)
    image = (image - image.min()) / (image.max() - image.min())
    shift = torch.randint(-6, 7, (2,), generator=generator)
    H = torch.eye(3, dtype=torch.float64)
    H[:2, 2] = shift.double()
    return {"image_a": image[0], "image_b": warp_image(image, H[None])[0], "H_ab": H}


class Pairs(Dataset):
    def __init__(self, length: int, only: int | None = None):
        self.length, self.only = length, only

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return one_pair(index if self.only is None else self.only)


def pair_loss(net, batch):
    return msip_loss(
        net(batch["image_a"]),
        net(batch["image_b"]),
        batch["H_ab"],
        windows=(8, 16),
        weights=(4.0, 1.0),
        border=6,
    )


def validate(net) -> float:
    batch = {k: v[None] for k, v in one_pair(10**6).items()}
    return -pair_loss(net, batch)[1]["loss"]


class Interrupted(Exception):
    pass


def breaking_loss(stop_at: int, action):
    """The loss, replaced by ``action`` at the given step."""
    calls = []

    def loss(net, batch):
        if len(calls) == stop_at:
            action()
        calls.append(1)
        return pair_loss(net, batch)

    return loss


def interrupt() -> None:
    raise Interrupted


def new_net() -> KeyNet:
    net = KeyNet(num_filters=2, num_blocks=1, num_levels=2)
    net.initialize(torch.Generator().manual_seed(0))
    return net


def train(
    checkpoint: Path,
    settings: FitSettings = SETTINGS,
    loss=pair_loss,
    data=Pairs,
    score=validate,
    *,
    resume=False,
    workers=0,
    save_every=0.0,
    identity=None,
    on_best=None,
    log_dir=None,
):
    net = new_net()
    task = Task(data, loss, score, identity=identity or {}, on_best=on_best)
    run = RunOptions("cpu", resume=resume, progress=False, workers=workers, save_every=save_every)
    result = Trainer(net, task, settings, checkpoint, run, log_dir).fit()
    return net, result


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken") / "state.ckpt")


def test_training_reduces_the_loss(tmp_path):
    seen = []

    def loss(net, batch):
        value, numbers = pair_loss(net, batch)
        seen.append(numbers["loss"])
        return value, numbers

    settings = replace(
        SETTINGS, steps=40, batch_size=1, learning_rate=2e-2, average=0.0, validate_every=40
    )
    net, result = train(tmp_path / "c", settings, loss, lambda length: Pairs(length, only=1))
    assert len(seen) == result.steps == 40
    assert sum(seen[-3:]) < 0.7 * sum(seen[:3])
    assert not net.training


def test_freed_memory_is_returned_while_training(tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(loop, "release_freed", lambda: released.append(0))
    _, result = train(tmp_path / "state.ckpt")
    assert len(released) == result.steps // loop.RELEASE_STEPS > 0


def test_same_seed_same_weights(tmp_path, unbroken):
    net, result = train(tmp_path / "c")
    assert same(net, unbroken[0])
    assert without_time(result.rows) == without_time(unbroken[1].rows)
    assert [row["step"] for row in result.rows] == [3, 6, 9]
    assert not same(net, new_net())


def test_number_of_workers_does_not_matter(tmp_path, unbroken):
    assert same(train(tmp_path / "c", workers=1)[0], unbroken[0])


def test_batches_contain_their_own_items(tmp_path):
    seen = []

    def loss(net, batch):
        seen.append(batch["image_a"].clone())
        return pair_loss(net, batch)

    train(tmp_path / "c", replace(SETTINGS, steps=2), loss)
    for step, images in enumerate(seen):
        for i in range(2):
            assert torch.equal(images[i], one_pair(2 * step + i)["image_a"])


@pytest.mark.parametrize("stop_at", [1, 4, BREAK])
def test_resumed_training_ends_at_the_same_weights(tmp_path, unbroken, stop_at):
    checkpoint = tmp_path / "deep" / "state.ckpt"
    with pytest.raises(Interrupted):
        train(checkpoint, loss=breaking_loss(stop_at, interrupt))
    assert read_checkpoint(checkpoint)["step"] == stop_at
    net, result = train(checkpoint, resume=True, loss=breaking_loss(STEPS - stop_at, interrupt))
    assert same(net, unbroken[0])
    assert result.best == unbroken[1].best
    assert result.best_step == unbroken[1].best_step
    for ours, theirs in zip(result.rows, unbroken[1].rows, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["repeatability"] == theirs["repeatability"]


def test_resumed_training_logs_the_same_loss(tmp_path, unbroken):
    with pytest.raises(Interrupted):
        train(tmp_path / "c", loss=breaking_loss(4, interrupt))
    _, result = train(tmp_path / "c", resume=True)
    assert without_time(result.rows) == without_time(unbroken[1].rows)


def test_interrupted_while_validating(tmp_path, unbroken):
    def broken(net):
        raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path / "c", score=broken)
    assert read_checkpoint(tmp_path / "c")["step"] == 3
    assert same(train(tmp_path / "c", resume=True)[0], unbroken[0])


def test_killed_training_resumes(tmp_path, unbroken):
    checkpoint = tmp_path / "state.ckpt"
    threads = torch.get_num_threads()  # another number of workers sums in another order
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import torch; torch.set_num_threads({threads}); import test_loop as t\n"
        f"kill = t.breaking_loss({BREAK}, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
        f"t.train(Path({str(checkpoint)!r}), loss=kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert read_checkpoint(checkpoint)["step"] == BREAK
    resumed, _ = train(checkpoint, resume=True)
    assert same(resumed, unbroken[0])


def test_resume_of_a_finished_training_returns_it(tmp_path):
    net, first = train(tmp_path / "c")
    again, second = train(tmp_path / "c", resume=True, loss=breaking_loss(0, interrupt))
    assert same(net, again)
    assert (first.best, first.best_step, first.steps) == (
        second.best,
        second.best_step,
        second.steps,
    )


def test_resume_without_checkpoint_starts(tmp_path, unbroken):
    assert same(train(tmp_path / "c", resume=True)[0], unbroken[0])


def test_without_resume_an_old_checkpoint_is_ignored(tmp_path, unbroken):
    with pytest.raises(Interrupted):
        train(tmp_path / "c", loss=breaking_loss(4, interrupt))
    assert same(train(tmp_path / "c")[0], unbroken[0])


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_damaged_checkpoint_raises(tmp_path, damage):
    checkpoint = tmp_path / "state.ckpt"
    train(checkpoint, replace(SETTINGS, steps=1))
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, checkpoint)
    else:
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(
            {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n" * 99}[damage]
        )
    before = checkpoint.read_bytes()
    with pytest.raises(WeightsError, match=r"state\.ckpt"):
        train(checkpoint, replace(SETTINGS, steps=1), resume=True)
    assert checkpoint.read_bytes() == before


def test_other_settings_raise(tmp_path):
    train(tmp_path / "c", replace(SETTINGS, steps=1), identity={"data": "x"})
    with pytest.raises(WeightsError, match=r"learning_rate was 0\.005, now 0\.5"):
        train(
            tmp_path / "c",
            replace(SETTINGS, steps=1, learning_rate=0.5),
            resume=True,
            identity={"data": "x"},
        )
    with pytest.raises(WeightsError, match="data was 'x', now 'y'"):
        train(tmp_path / "c", replace(SETTINGS, steps=1), resume=True, identity={"data": "y"})
    train(
        tmp_path / "c",
        replace(SETTINGS, steps=1),
        resume=True,
        workers=1,
        save_every=9.0,
        identity={"data": "x"},
    )


def test_infinite_loss_stops_the_training(tmp_path):
    def loss(net, batch):
        value, numbers = pair_loss(net, batch)
        return value * float("nan"), numbers

    with pytest.raises(RuntimeError, match="at step 0; lower the learning rate"):
        train(tmp_path / "c", loss=loss)


def test_full_disk_does_not_stop_the_training(tmp_path, unbroken, monkeypatch, caplog):
    def full(state, path):
        raise OSError(f"checkpoint {path} could not be written (No space left on device)")

    monkeypatch.setattr(loop, "save_atomically", full)
    net, _ = train(tmp_path / "c")
    assert same(net, unbroken[0])
    assert "No space left on device" in caplog.text
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "state.ckpt"
    save_atomically({"version": 2, "step": 3}, path)

    def full(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not be written"):
        save_atomically({"version": 2, "step": 4}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["state.ckpt"]


def test_best_weights_are_kept(tmp_path):
    scores = iter([0.3, 0.8, 0.5])
    kept = []
    net, result = train(
        tmp_path / "c",
        score=lambda net: next(scores),
        on_best=lambda state, facts: kept.append((state, facts)),
    )
    assert (result.best, result.best_step) == (0.8, 6)
    assert [facts["step"] for _, facts in kept] == [3, 6]
    for key, value in net.state_dict().items():
        assert torch.equal(value, kept[-1][0][key])


def test_log_resumes_where_it_stopped(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "c", loss=breaking_loss(4, interrupt), log_dir=tmp_path / "log")
    train(tmp_path / "c", resume=True, log_dir=tmp_path / "log")
    lines = (tmp_path / "log" / "log.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,repeatability")
    assert [line.split(",")[0] for line in lines[1:]] == ["3", "6", "9"]


def test_minutes_fix_the_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "TIMED_STEPS", 2)
    _, result = train(tmp_path / "c", replace(SETTINGS, steps=0, minutes=0.02, batch_size=1))
    assert result.steps > 4
    assert result.rows[-1]["step"] == result.steps


def test_minutes_include_start_and_validations(tmp_path):
    """Slow steps and validations: timing ends early, and the duration is kept."""

    def slow_loss(net, batch):
        time.sleep(0.05)
        return pair_loss(net, batch)

    def slow_score(net):
        time.sleep(0.2)
        return validate(net)

    seconds = 3.0
    settings = replace(SETTINGS, steps=0, minutes=seconds / 60, batch_size=1, validate_every=10)
    started = time.monotonic()
    run = RunOptions("cpu", progress=False, workers=0, started=started - 0.5)
    task = Task(Pairs, slow_loss, slow_score)
    result = Trainer(new_net(), task, settings, tmp_path / "c", run).fit()
    assert result.rows[-1]["step"] == result.steps > 5
    assert 0.5 * seconds < time.monotonic() - started + 0.5 < 1.4 * seconds
    # a start that took all of the time: a few steps, which are validated
    run = RunOptions("cpu", progress=False, workers=0, started=time.monotonic() - 10)
    result = Trainer(new_net(), Task(Pairs, slow_loss, slow_score), settings, tmp_path / "d", run)
    assert result.fit().steps == 2


def test_progress_shows_the_score_after_the_first_validation(tmp_path, monkeypatch):
    shown = []

    class Shown(loop.Progress):
        def set_values(self, **values):
            shown.append(values)

    monkeypatch.setattr(loop, "Progress", Shown)
    train(tmp_path / "c")
    assert [len(values) for values in shown] == [1, 1, *[2] * 7]
    assert "best repeatability" in shown[2]


def test_checkpoints_of_earlier_versions_are_resumed(tmp_path, unbroken):
    """Without the settings and values that were added later."""
    with pytest.raises(Interrupted):
        train(tmp_path / "c", loss=breaking_loss(BREAK, interrupt))
    state = read_checkpoint(tmp_path / "c")
    del state["identity"]["settings"]["decay_at"], state["recent_values"], state["arguments"]
    save_atomically(state, tmp_path / "c")
    assert same(train(tmp_path / "c", resume=True)[0], unbroken[0])


def test_learning_rate_is_reduced_at_a_fraction_of_the_steps():
    settings = FitSettings(warmup=0, decay="step", decay_at=0.75, final_rate=0.5, learning_rate=1.0)
    assert [learning_rate_at(step, 8, settings) for step in (0, 5, 6, 7)] == [1, 1, 0.5, 0.5]
    with pytest.raises(ValueError, match="decay_at"):
        FitSettings(decay_at=0.0)


def test_learning_rate():
    settings = FitSettings(learning_rate=1.0, warmup=10, final_rate=0.1)
    rates = [learning_rate_at(step, 110, settings) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert max(rates) <= 1


@pytest.mark.parametrize("device", ["gpu0", "abc"])
def test_unknown_device(tmp_path, device):
    task = Task(Pairs, pair_loss, validate)
    with pytest.raises(ValueError, match="device must be"):
        Trainer(new_net(), task, SETTINGS, tmp_path / "c", RunOptions(device))
