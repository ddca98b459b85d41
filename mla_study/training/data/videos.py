"""Training data from a folder of videos: latents made once and kept, captions beside them.

Shapes: C latent channels, F latent frames, h x w latent, n video frames, H x W pixels, T text
tokens, E text channels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError, counted
from mla_study.rollout.clips import fitted, read_clip
from mla_study.rollout.prompts import Encoder
from mla_study.study.runs import atomic_write, file_sha256
from mla_study.training.batch import Batch
from mla_study.training.data.captions import Captioned
from mla_study.training.data.order import place
from mla_study.training.data.shards import Shards, alone

CACHE = ".mla_study"
"""Folder beside the data that holds what was made of them."""

ClipEncoder = Callable[[Tensor], Tensor]
"""A clip [1, 3, n, H, W] in [-1, 1] to latents [1, C, F, h, w]."""


def kept_in(cache: Path, kind: str, facts: dict[str, Any]) -> Shards:
    """The shards of what these facts make."""
    told = json.dumps(facts, sort_keys=True)
    return Shards(cache / f"{kind}-{hashlib.sha256(told.encode()).hexdigest()[:12]}")


@dataclass(frozen=True)
class Shot:
    """What is taken of each video, from its beginning.

    Attributes:
        frames: n.
        size: (height, width) in pixels; frames are scaled to cover it and cropped to its middle.
        fps: frames a second, the nearest of the video's; None takes every frame.
    """

    frames: int
    size: tuple[int, int]
    fps: float | None = None

    def facts(self) -> dict[str, Any]:
        """Plain values."""
        return {"frames": self.frames, "size": list(self.size), "fps": self.fps}


@dataclass
class VideoFolder:
    """Videos with captions; :meth:`prepare` comes before :meth:`batch`.

    Attributes:
        folder: that the videos are named from.
        cache: holds the latents.
        encode: text encoder.
        make: loads the encoder of clips; asked only where latents are missing.
        made_by: plain values that identify that encoder.
        max_bad: share of videos that may be of no use (one always may).
        bad: why some are, by file.
    """

    clips: Sequence[Captioned]
    folder: Path
    cache: Path
    encode: Encoder
    shot: Shot
    make: Callable[[], ClipEncoder]
    made_by: dict[str, Any]
    seed: int = 0
    max_bad: float = 0.05
    say: Callable[[str], object] = print
    bad: dict[str, str] = field(default_factory=dict)
    _kept: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        facts = {**self.shot.facts(), "encoder": self.made_by}
        self.shards = kept_in(self.cache, "latents", facts)

    def prepare(self, progress: bool = True) -> None:
        """Make what latents are missing; the same call goes on after an interruption.

        Videos that do not decode, or are too short, are skipped and listed at the end.

        Raises:
            UserError: too many of these (the last is told, the others are named), or the cache
                cannot be written.
        """
        from tqdm import tqdm

        self._kept.clear()
        self.bad.clear()
        sizes: dict[str, tuple[int, int]] = {}
        encoder: ClipEncoder | None = None
        digests = self._digests()
        with self.shards.adding():
            for clip in tqdm(self.clips, desc="latents", unit="video", disable=not progress):
                key = digests[clip.video]
                if key not in self.shards:
                    try:
                        pixels = self._read(clip.video, sizes)
                        encoder = encoder or self.make()
                        self.shards.put(key, _finite(encoder(pixels), clip.video)[0])
                    except _BadVideoError as error:
                        self._fail(clip, error)
                        continue
                self._kept.append((key, clip.caption))
        self._tell(sizes)
        if not self._kept:
            raise UserError(
                f"{self.folder}: no video could be used: {next(iter(self.bad.values()))}"
            )

    def _name(self, video: Path) -> str:
        return str(video.relative_to(self.folder) if video.is_relative_to(self.folder) else video)

    def _fail(self, clip: Captioned, error: UserError) -> None:
        self.bad[self._name(clip.video)] = str(error)
        if len(self.bad) > max(1, int(self.max_bad * len(self.clips))):
            raise UserError(
                f"{len(self.bad)} of {len(self.clips)} videos cannot be used, more than "
                f"{self.max_bad:.0%}: {error} (all so far: {', '.join(self.bad)}); mend them or "
                "take them out"
            ) from None

    def _tell(self, sizes: dict[str, tuple[int, int]]) -> None:
        if self.bad:
            told = "; ".join(self.bad.values())
            self.say(f"{len(self.bad)} of {len(self.clips)} videos were skipped: {told}")
        if len(set(sizes.values())) > 1:
            most = Counter(sizes.values()).most_common(1)[0][0]
            other = [f"{n} ({h} x {w})" for n, (h, w) in sizes.items() if (h, w) != most]
            height, width = self.shot.size
            self.say(
                f"{len(other)} of {len(sizes)} videos are not of {most[0]} x {most[1]} as most "
                f"are: {', '.join(other)}; all are scaled and cropped to {height} x {width}"
            )

    def _read(self, video: Path, sizes: dict[str, tuple[int, int]]) -> Float[Tensor, "1 3 n H W"]:
        pieces: list[Tensor] = []
        try:
            for piece in read_clip(video, self.shot.frames, fps=self.shot.fps):
                sizes.setdefault(self._name(video), (piece.shape[2], piece.shape[3]))
                pieces.append(fitted(piece, self.shot.size, "bicubic"))
        except UserError as error:
            raise _BadVideoError(str(error)) from None
        pixels = torch.cat(pieces, dim=2)
        if pixels.shape[2] < self.shot.frames:
            rate = "" if self.shot.fps is None else f" at {self.shot.fps:g} a second"
            raise _BadVideoError(
                f"{self._name(video)} is too short: it has {counted(pixels.shape[2], 'frame')}"
                f"{rate}, but a clip needs {self.shot.frames}"
            )
        return pixels

    def _digests(self) -> dict[Path, str]:
        """SHA-256 of each video; only new and changed files are read again."""
        path = self.cache / "videos.json"
        with alone(self.cache):
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                known = {}
            made: dict[Path, str] = {}
            fresh: dict[str, list[Any]] = {}
            for video in dict.fromkeys(clip.video for clip in self.clips):
                try:
                    stat = video.stat()
                    state = [stat.st_size, stat.st_mtime_ns]
                    held = known.get(str(video), [])
                    made[video] = held[2] if held[:2] == state else file_sha256(video)
                except OSError as error:
                    raise UserError(
                        f"{video} cannot be read ({error.strerror or error}): mend it or take it "
                        "out of the captions"
                    ) from None
                fresh[str(video)] = [*state, made[video]]
            if any(known.get(name) != entry for name, entry in fresh.items()):
                atomic_write(path, json.dumps({**known, **fresh}).encode())
        return made

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """The empty prompt."""
        return self.encode([""]).float()

    def batch(self, samples: Sequence[int]) -> Batch:
        """The clips with these numbers."""
        if not self._kept:
            raise UserError(f"the latents of {self.folder} are not made yet: prepare them first")
        chosen = [self._kept[place(n, len(self._kept), self.seed)] for n in samples]
        latents = torch.stack([self.shards.read(key).float() for key, _ in chosen])
        told = tuple(caption for _, caption in chosen)
        return Batch(self.encode(told).float(), latents, told)

    def facts(self) -> dict[str, Any]:
        """Hash over the clips and captions that are used, and how they were encoded."""
        held = json.dumps(self._kept)
        digest = hashlib.sha256(held.encode()).hexdigest()
        facts = {"clips": len(self._kept), "sha256": digest, **self.shot.facts()}
        return {"kind": "videos", "seed": self.seed, **facts, "encoder": dict(self.made_by)}


class _BadVideoError(UserError):
    """One video is of no use; others may be."""


def _finite(latents: Tensor, video: Path) -> Tensor:
    if not bool(torch.isfinite(latents).all()):
        raise _BadVideoError(f"{video.name} gives latents that are not finite")
    return latents
