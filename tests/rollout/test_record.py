"""Recording: interrupted anywhere, resumed, it gives the same bytes; what is there plays."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mla_study.config import LatentConfig, ModelConfig, WindowConfig, mini
from mla_study.errors import UserError
from mla_study.rollout import record as record_module
from mla_study.rollout.record import Recorded, latent_frames, record
from mla_study.rollout.resume import state_path
from mla_study.rollout.stream import Rollout, RolloutConfig, random_model
from mla_study.rollout.video import PreviewDecoder

TINY = replace(
    mini(), layers=1, width=32, heads=2, ffn_width=48, text_dim=10, latent_size=(4, 6),
    window=WindowConfig(1, 3, 2), latent=LatentConfig(6, 8, 10, 6, (1, 1, 1)),
)  # fmt: skip
SUFFIXES = [".mp4", ".gif", ".webp", "", ".png", ".safetensors"]


class Blur(PreviewDecoder):
    """A decoder whose frames depend on the two latent frames before, as a VAE's do."""

    context_frames = 2

    def __init__(self, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__(config, size)
        self.before: Tensor | None = None

    def decode(self, latents: Tensor) -> np.ndarray:
        known = latents if self.before is None else torch.cat([self.before, latents], dim=2)
        self.before = known[:, :, -2:]
        padded = torch.cat([torch.zeros_like(known[:, :, :2]), known], dim=2)
        mixed = (padded[:, :, 2:] + padded[:, :, :-2]) / 2
        return super().decode(mixed[:, :, -latents.shape[2] :])

    def warm_up(self, latents: Tensor) -> None:
        self.before = latents[:, :, -2:]


def start(batch: int = 1, config: ModelConfig = TINY, **options: object) -> Rollout:
    settings = RolloutConfig(seed=3, batch=batch, recache=True, **options)  # type: ignore[arg-type]
    return Rollout(random_model(config), "a red disc", settings, prompt_at={3: "a blue cross"})


def make(
    out: Path, chunks: int | None = 6, rollout: Rollout | None = None, **more: object
) -> Recorded:
    rollout = rollout or start()
    decoder = Blur(TINY, (4, 6))
    return record(rollout, out, decoder, Fraction(8), chunks=chunks, **more)  # type: ignore[arg-type]


def same(left: tuple[Path, ...], right: tuple[Path, ...]) -> bool:
    """Equal bytes; of MP4 equal times and frames that look alike, for x264's bytes may differ."""
    ours, theirs = content(left), content(right)
    if list(ours) != list(theirs) or left[0].suffix != ".mp4":
        return ours == theirs
    pairs = [(timed(a), timed(b)) for a, b in zip(left, right, strict=True)]
    return all(list(a) == list(b) and alike([*a.values()], [*b.values()]) for a, b in pairs)


def alike(shown: list[np.ndarray], meant: list[np.ndarray]) -> bool:
    # chroma is kept at half the resolution, but the blocks are flat
    return len(shown) == len(meant) and all(
        np.abs(a.astype(int) - b).mean() < 6 for a, b in zip(shown, meant, strict=True)
    )


def content(paths: tuple[Path, ...]) -> dict[str, bytes]:
    """All bytes below the paths, by place; frames of name.png lie side by side."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.iterdir())
        elif path.suffix == ".png":
            files += sorted(path.parent.glob(f"{path.stem}_*.png"))
        else:
            files.append(path)
    return {file.name: file.read_bytes() for file in files}


def timed(path: Path) -> dict[Fraction, np.ndarray]:
    with av.open(path) as video:
        frames = list(video.decode(video=0))
    return {f.pts * f.time_base: f.to_ndarray(format="rgb24") for f in frames}


def decoded(path: Path) -> list[np.ndarray]:
    return list(timed(path).values())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_anywhere_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, batch: int, seed: int
) -> None:
    """Cut while a chunk is made, before its state is saved, or after."""
    chance = random.Random(seed)
    whole = make(tmp_path / f"whole/a{suffix}", rollout=start(batch)).paths
    out = tmp_path / f"cut/a{suffix}"
    for resume in (False, True, True):
        where, count = chance.choice(["advance", "save"]), chance.randrange(2)
        with monkeypatch.context() as patch:
            owner = record_module if where == "save" else Rollout
            patch.setattr(owner, where, failing(getattr(owner, where), count))
            with pytest.raises(ZeroDivisionError):
                make(out, 6, start(batch), resume=resume)
    for _ in range(2):
        assert same(make(out, 6, start(batch), resume=True).paths, whole)


def failing(call: Callable[..., object], count: int) -> Callable[..., object]:
    left = [count]

    def wrapped(*args: object, **named: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise ZeroDivisionError
        return call(*args, **named)

    return wrapped


def test_chunks_of_one_frame_resume_too(tmp_path: Path) -> None:
    config = replace(TINY, window=WindowConfig(0, 2, 1))
    whole = make(tmp_path / "a/a.png", 4, start(config=config)).paths
    make(tmp_path / "b/a.png", 1, start(config=config))
    assert same(make(tmp_path / "b/a.png", 4, start(config=config), resume=True).paths, whole)


@pytest.mark.parametrize("suffix", [".mp4", ".safetensors", ".png"])
def test_a_finished_video_can_be_made_longer(tmp_path: Path, suffix: str) -> None:
    whole = make(tmp_path / f"whole/a{suffix}", 5).paths
    out = tmp_path / f"grown/a{suffix}"
    make(out, 3)
    assert same(make(out, 5, resume=True).paths, whole)


def test_states_may_be_rarer_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = make(tmp_path / "a/a.mp4").paths, tmp_path / "b/a.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "advance", failing(Rollout.advance, 5))
        with pytest.raises(ZeroDivisionError):
            make(out, save_every=4)
    assert len(decoded(out)) == 10
    assert same(make(out, save_every=4, resume=True).paths, whole)
    make(tmp_path / "c.mp4", save_every=0)
    assert not state_path(tmp_path / "c.mp4").exists()


def test_the_video_shows_the_latents(tmp_path: Path) -> None:
    rollout = start()
    latents = torch.cat([chunk.latents for chunk in chunks_of(rollout, 3)], dim=2)
    expected = Blur(TINY, (4, 6)).decode(latents)[0]
    make(tmp_path / "a.mp4", 3)
    make(tmp_path / "frames", 3)
    make(tmp_path / "a.webp", 3)
    make(tmp_path / "a.safetensors", 3)
    assert alike(decoded(tmp_path / "a.mp4"), list(expected))
    files = sorted((tmp_path / "frames").iterdir())
    assert [f.name for f in files[:2]] == ["000000.png", "000001.png"] and len(files) == 6
    assert all(np.array_equal(Image.open(f), e) for f, e in zip(files, expected, strict=True))
    with Image.open(tmp_path / "a.webp") as animation:
        animation.seek(5)
        animation.load()
        assert animation.n_frames == 6 and animation.info["duration"] == 125
    assert torch.equal(load_file(tmp_path / "a.safetensors")["latents"], latents)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def chunks_of(rollout: Rollout, count: int):
    return [rollout.advance() for _ in range(count)]


def test_times_of_the_video_are_those_of_its_frames(tmp_path: Path) -> None:
    record(
        start(), tmp_path / "a.mp4", PreviewDecoder(TINY, (4, 6)), Fraction(30000, 1001), chunks=3
    )
    with av.open(tmp_path / "a.mp4") as video:
        times = [frame.pts * frame.time_base for frame in video.decode(video=0)]
    assert times == [Fraction(1001 * i, 30000) for i in range(6)]


def test_odd_sizes_become_even(tmp_path: Path) -> None:
    odd = PreviewDecoder(TINY, (4, 6))
    odd.scale = 25
    config = replace(TINY, latent_size=(3, 5), patch=(1, 1, 1))
    rollout = Rollout(random_model(config), "a")
    record(rollout, tmp_path / "a.mp4", odd, Fraction(8), chunks=1)
    assert decoded(tmp_path / "a.mp4")[0].shape == (76, 126, 3)


RUN = """
import sys, tyro
from mla_study.cli import _guarded
from mla_study.commands.generate import Generate
options = tyro.cli(Generate, config=(tyro.conf.FlagCreatePairsOff,))
sys.exit(_guarded("mla-study", options.run))
"""


def generate(*words: str) -> list[str]:
    return [sys.executable, "-c", RUN, "a red disc", "--random-weights", *words]


def test_sixty_chunks_killed_at_random(tmp_path: Path, seed: int) -> None:
    """The file plays up to the kill, and the resumed run ends with the same bytes."""
    words = ("--frames", "180", "--seed", "5", "--prompt-at", "40:a blue cross")
    chance = random.Random(seed)
    outs = [tmp_path / "a.mp4", tmp_path / "a.safetensors"]
    killed = [subprocess.Popen(generate("--out", str(out), *words)) for out in outs]
    while not state_path(outs[0]).exists() and killed[0].poll() is None:
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 2))
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(decoded(outs[0])) >= 3
    for out in outs:
        subprocess.run(generate("--out", str(out), *words, "--resume"), check=True)
    rollout = Rollout(
        random_model(mini(latent=True)), "a red disc", RolloutConfig(5),
        prompt_at={40: "a blue cross"},
    )  # fmt: skip
    latents = torch.cat([chunk.latents for chunk in chunks_of(rollout, 60)], dim=2)
    assert torch.equal(load_file(outs[1])["latents"], latents)
    meant = PreviewDecoder(mini(), (6, 6)).decode(latents)[0]
    assert alike(decoded(outs[0]), list(meant))


def test_ctrl_c_finishes_the_chunk_and_closes_the_file(tmp_path: Path) -> None:
    out = tmp_path / "a.webp"
    process = subprocess.Popen(
        generate("--out", str(out), "--seconds", "inf"), stderr=subprocess.PIPE, text=True
    )
    while not state_path(out).exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130
    assert "--resume goes on" in told and "Traceback" not in told
    with Image.open(out) as animation:
        assert animation.n_frames >= 3


def test_a_full_disk_leaves_a_video_that_plays(tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = make(tmp_path / "whole.mp4", 20)
    size = whole.paths[0].stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        with pytest.raises(UserError, match=r"after frame .*what is there stays.*--resume"):
            make(out, 20, save_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    there = decoded(out)
    assert 2 <= len(there) < 40 and len(there) % 2 == 0
    assert alike(there, decoded(whole.paths[0])[: len(there)])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_told_for_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    from mla_study.rollout import sinks

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "advance", failing(Rollout.advance, 2))
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / f"a{suffix}", 3)
    monkeypatch.setattr(sinks, "_write_all", full)
    monkeypatch.setattr(sinks, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        make(tmp_path / f"a{suffix}", 3, resume=True)


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    make(out, 2)
    other = Rollout(random_model(TINY, 1), "a green disc", RolloutConfig(4, storage="bf16"))
    with pytest.raises(UserError) as told:
        make(out, 3, other, resume=True)
    for word in ("rollout.seed was 3, is 4", "rollout.storage", "embeddings", "weights"):
        assert word in str(told.value)
    out.write_bytes(b"")
    with pytest.raises(UserError, match="shorter"):
        make(out, 3, resume=True)
    state_path(out).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        make(out, 3, resume=True)
    said: list[str] = []
    state_path(out).unlink()
    make(out, 2, resume=True, say=said.append)
    assert "starting at the first chunk" in said[0]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for out, word in (
        (tmp_path / "file" / "a.mp4", "not writable"),
        (Path("/proc/nowhere/a.mp4"), "not writable"),
        (tmp_path / "folder.mp4", "is a folder"),
        (tmp_path / "a.avi", "avi"),
    ):
        with pytest.raises(UserError, match=word):
            make(out, 1)


def test_bad_words_exit_with_two(tmp_path: Path) -> None:
    from mla_study.commands.generate import Generate

    out = tmp_path / "a.mp4"
    good = Generate(("a",), out, random_weights=True, frames=3)
    for change in (
        {"random_weights": False},
        {"checkpoint": "x"},
        {"preset": "huge"},
        {"window": "1,2"},
        {"size": "6"},
        {"prompt_at": ("x:y",)},
        {"prompt_at": ("1:a", "1:b")},
        {"prompt_at": ("0:a",)},
        {"frames": 0},
        {"seconds": 1.0},
        {"frames": None, "seconds": float("nan")},
        {"fps": 0.0},
        {"batch": 0},
        {"device": "toaster"},
        {"save_every": -1},
        {"threads": 0},
        {"wan": tmp_path},
        {"embeddings": tmp_path / "none"},
    ):
        with pytest.raises(UserError):
            replace(good, **change).run()


def test_seconds_are_filled() -> None:
    assert latent_frames(5, 16, 4) == 21
    assert latent_frames(5.1, 16, 4) == 22
    assert latent_frames(1, 8, 1) == 8
    assert latent_frames(0.01, 16, 4) == 1


def test_no_file_stays_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    make(tmp_path / "a.mp4", 4)
    assert len(list(descriptors.iterdir())) == before
