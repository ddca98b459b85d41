"""Where frames and latents go: files that grow while they are made and go on after a cut.

The suffix chooses: ``.mp4`` is fragmented H.264 that plays while it is written and after a kill;
``.png`` or no suffix a folder of frames; ``.webp`` and ``.gif`` an animation, put together at the
end from frames kept beside it; ``.safetensors`` the latents themselves, likewise.

Every sink can be opened at a :class:`Mark`, which cuts off what came later.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mla_study.errors import UserError
from mla_study.rollout.fragments import encode

Kind = Literal["mp4", "frames", "animation", "latents"]
SUFFIXES: dict[str, Kind] = {
    ".mp4": "mp4",
    ".png": "frames",
    "": "frames",
    ".webp": "animation",
    ".gif": "animation",
    ".safetensors": "latents",
}


def kind_of(path: Path) -> Kind:
    """What the suffix of ``path`` asks for; UserError for one that is not known."""
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(suffix for suffix in SUFFIXES if suffix)
        raise UserError(f"no video is written to {path}: give it {known} or no suffix")
    return SUFFIXES[path.suffix.lower()]


@dataclass(frozen=True)
class Mark:
    """How far a sink had come: frames written, and where the file ended."""

    frames: int = 0
    bytes: int = 0


@runtime_checkable
class Sink(Protocol):
    """A file or folder that frames [n, height, width, 3] uint8 are appended to."""

    path: Path

    @property
    def mark(self) -> Mark:
        """How far it has come."""
        ...

    def write(self, frames: np.ndarray) -> None:
        """Append; what was there stays whole when this fails."""
        ...

    def close(self, finished: bool) -> None:
        """Make the file final; what only a resumption needs goes where it is ``finished``."""
        ...


@contextmanager
def writing(path: Path, frames: int) -> Generator[None]:
    """Turn a failing disk into a sentence that says what is left."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written after frame {frames} ({error.strerror or error}): "
            + ("what is there stays; " if frames else "")
            + "free space or give another place, and go on with --resume"
        ) from None


def check_place(path: Path) -> None:
    """Make the folder of ``path`` and see that files can be made there; UserError otherwise."""
    probe = path.parent / f".{path.name}.{os.getpid()}.probe"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the folder {path.parent} is not writable ({error.strerror}): give another --out"
        ) from None
    if kind_of(path) != "frames" and path.is_dir():
        raise UserError(f"{path} is a folder: give --out a file")


class Mp4Sink:
    """One fragment a call of :meth:`write`."""

    def __init__(self, path: Path, fps: Fraction, mark: Mark | None = None) -> None:
        self.path, self.fps, self.mark = path, fps, mark or Mark()
        self._header = b""
        with writing(path, self.mark.frames):
            if self.mark.bytes and (not path.exists() or path.stat().st_size < self.mark.bytes):
                raise UserError(f"{path} is shorter than its saved state says: start anew")
            flags = os.O_RDWR | os.O_CREAT | (0 if self.mark.bytes else os.O_TRUNC)
            self._file = os.open(path, flags, 0o666)
            os.ftruncate(self._file, self.mark.bytes)
            os.lseek(self._file, self.mark.bytes, os.SEEK_SET)
        self._fragments = self.mark.frames  # any rising number serves

    def write(self, frames: np.ndarray) -> None:
        """Append a fragment, in one piece."""
        header, fragment = encode(frames, self.fps, self.mark.frames, self._fragments + 1)
        if not self._header and self.mark.bytes:
            self._header = os.pread(self._file, len(header), 0)
        if self._header and header != self._header:
            raise UserError(
                f"{self.path} was begun at another size or by another encoder: start anew"
            )
        data = fragment if self._header else header + fragment
        self._header = header
        with writing(self.path, self.mark.frames):
            try:
                _write_all(self._file, data)
            except OSError:
                os.ftruncate(self._file, self.mark.bytes)
                raise
        self._fragments += len(frames)
        self.mark = Mark(self.mark.frames + len(frames), self.mark.bytes + len(data))

    def close(self, finished: bool) -> None:
        """Nothing is left to write."""
        del finished
        os.close(self._file)


class FrameSink:
    """A folder of PNG files 000000.png ...; ``name.png`` puts name_000000.png ... side by side."""

    def __init__(self, path: Path, mark: Mark | None = None) -> None:
        self.path, self.mark = path, mark or Mark()
        self.folder = path.parent if path.suffix else path
        self.prefix = f"{path.stem}_" if path.suffix else ""
        with writing(path, self.mark.frames):
            self.folder.mkdir(parents=True, exist_ok=True)
            for index, stale in self._present():
                if index >= self.mark.frames:
                    stale.unlink()
        if len(self.files()) < self.mark.frames:
            raise UserError(f"{path} holds fewer frames than its saved state says: start anew")

    def _present(self) -> list[tuple[int, Path]]:
        own = re.compile(rf"{re.escape(self.prefix)}(\d{{6,}})\.png")
        found = ((own.fullmatch(file.name), file) for file in self.folder.iterdir())
        return sorted((int(match[1]), file) for match, file in found if match)

    def files(self) -> list[Path]:
        """The frames written, in order."""
        return [file for index, file in self._present() if index < self.mark.frames]

    def write(self, frames: np.ndarray) -> None:
        """Append frames, each complete or absent."""
        from PIL import Image

        first = self.mark.frames
        with writing(self.path, first):
            for index, pixels in enumerate(frames, first):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "png")
                replace(self.folder / f"{self.prefix}{index:06d}.png", _bytes(buffer.getvalue()))
        self.mark = Mark(first + len(frames))

    def close(self, finished: bool) -> None:
        """Nothing is left to write."""
        del finished


class AnimationSink:
    """WebP or GIF, which cannot grow: frames wait in a hidden folder until :meth:`close`."""

    def __init__(self, path: Path, fps: Fraction, mark: Mark | None = None) -> None:
        self.path, self.fps = path, fps
        self._frames = FrameSink(path.parent / f".{path.name.replace('.', '-')}-frames", mark)

    @property
    def mark(self) -> Mark:
        """How many frames wait."""
        return self._frames.mark

    def write(self, frames: np.ndarray) -> None:
        """Keep the frames."""
        self._frames.write(frames)

    def close(self, finished: bool) -> None:
        """Put the animation together."""
        from PIL import Image

        files = self._frames.files()
        if files:
            rest = (Image.open(file) for file in files[1:])
            options: dict[str, Any] = {"duration": float(1000 / self.fps), "loop": 0}
            if self.path.suffix.lower() == ".webp":
                options |= {"quality": 90, "method": 2}
            options |= {"format": self.path.suffix[1:].upper(), "save_all": True}
            with writing(self.path, self.mark.frames), Image.open(files[0]) as start:
                replace(self.path, lambda to: start.save(to, append_images=rest, **options))
        if finished:
            shutil.rmtree(self._frames.folder)


class LatentSink:
    """Latents [B, C, F, height, width]: a part a chunk in a hidden folder, one file at the end."""

    def __init__(self, path: Path, facts: dict[str, str], mark: Mark | None = None) -> None:
        self.path, self.facts, self.mark = path, facts, mark or Mark()
        self.folder = path.parent / f".{path.name}-parts"
        with writing(path, self.mark.frames):
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.iterdir():
                if not part.stem.isdigit() or int(part.stem) >= self.mark.frames:
                    part.unlink()
            if self.mark.frames and not self._parts() and path.exists():
                # a finished file that is to grow further
                shutil.copyfile(path, self._part(0))
        held = self._parts()
        if self.mark.frames and (not held or _frames_held(held[-1]) != self.mark.frames):
            raise UserError(f"{path} lacks parts that its saved state names: start anew")

    def _part(self, frame: int) -> Path:
        return self.folder / f"{frame:09d}.safetensors"

    def _parts(self) -> list[Path]:
        return sorted(part for part in self.folder.iterdir() if part.stem.isdigit())

    def write(self, latents: Tensor) -> None:
        """Append latents [B, C, f, height, width]."""
        from safetensors.torch import save_file

        held = {"latents": latents.detach().cpu().contiguous()}
        with writing(self.path, self.mark.frames):
            replace(self._part(self.mark.frames), lambda to: save_file(held, to))
        self.mark = Mark(self.mark.frames + latents.shape[2])

    def close(self, finished: bool) -> None:
        """Put the parts together, one in memory at a time."""
        parts = self._parts()
        if parts:
            with writing(self.path, self.mark.frames):
                replace(self.path, lambda to: join_latents(parts, to, self.facts))
        if finished:
            shutil.rmtree(self.folder)


def join_latents(parts: list[Path], target: Path, facts: dict[str, str]) -> None:
    """Join files of latents along their frame axis into one safetensors file."""
    from safetensors.torch import load_file

    first = load_file(parts[0])["latents"]
    frames = _frames_held(parts[-1])
    shape = [*first.shape[:2], frames, *first.shape[3:]]
    names = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}
    total = int(np.prod(shape)) * first.element_size()
    entry = {"dtype": names[first.dtype], "shape": shape, "data_offsets": [0, total]}
    head = json.dumps({"__metadata__": facts, "latents": entry}).encode()
    head += b" " * (-len(head) % 8)
    row = shape[3] * shape[4] * first.element_size()
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        base = file.tell()
        for part in parts:
            start, held = int(part.stem), load_file(part)["latents"]
            raw = held.view(torch.uint8).flatten(0, 1).flatten(1)
            for index, run in enumerate(raw):
                file.seek(base + (index * frames + start) * row)
                file.write(run.numpy().tobytes())


def _frames_held(last: Path) -> int:
    from safetensors import safe_open

    with safe_open(last, "pt") as file:
        return int(last.stem) + file.get_slice("latents").get_shape()[2]


def replace(path: Path, make: Callable[[Path], object]) -> None:
    """Have ``make`` write a file beside ``path`` and put it in place whole, or not at all."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        try:
            make(temporary)
        except OSError:
            raise
        except Exception as error:  # safetensors reports a full disk by an exception of its own
            if "SafetensorError" not in type(error).__name__:
                raise
            raise OSError(None, str(error)) from None
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda to: to.write_bytes(data)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def marks_json(marks: list[Mark]) -> str:
    """Marks as text; :func:`marks_from` reads them."""
    return json.dumps([asdict(mark) for mark in marks])


def marks_from(text: str) -> list[Mark]:
    """Marks of :func:`marks_json`."""
    return [Mark(**mark) for mark in json.loads(text)]
