"""Run a rollout into files: resumable after every chunk, stoppable between two.

Example::

    rollout = Rollout(model, "a red disc", RolloutConfig(seed=1))
    record(rollout, Path("disc.mp4"), PreviewDecoder(model.config), Fraction(8), chunks=20)
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from mla_study.errors import UserError, counted
from mla_study.rollout.resume import Saved, identity, kept_tail, load, save, state_path
from mla_study.rollout.sinks import check_place, kind_of
from mla_study.rollout.stream import Rollout
from mla_study.rollout.video import Decoder, VideoWriter, sample_paths


@dataclass(frozen=True)
class Recorded:
    """What came out: chunks in all, frames in each file, and whether it was stopped early."""

    chunks: int
    frames: int
    paths: tuple[Path, ...]
    interrupted: bool


def record(
    rollout: Rollout,
    out: Path,
    decoder: Decoder,
    fps: Fraction,
    *,
    chunks: int | None,
    resume: bool = False,
    save_every: int = 1,
    facts: Mapping[str, object] | None = None,
    say: Callable[[str], object] = lambda sentence: print(sentence, file=sys.stderr),
) -> Recorded:
    """Make chunks and write them until there are ``chunks``; None goes on until interrupted.

    Ctrl-C (SIGINT) lets the chunk finish and closes the files; a second one stops at once.

    Args:
        rollout: at its start.
        out: the suffix chooses what is written, see :mod:`~mla_study.rollout.sinks`.
        decoder: latents to frames; fps: frames a second that it gives.
        resume: go on from the state that lies beside ``out``, where there is one.
        save_every: chunks between saved states; 0 saves none.
        facts: more that a resumed rollout must share.
        say: takes the sentences that the user should read.

    Raises:
        UserError: nothing can be written there, the disk is full (what is there stays and plays),
            the state belongs to another rollout, or the model's output is not finite.
    """
    check_place(out)
    pixels = kind_of(out) != "latents"
    told = {"fps": str(fps), "suffix": out.suffix.lower(), **(facts or {})}
    known = identity(rollout, {"video": told})
    saved = _restored(state_path(out), rollout, known, say) if resume else None
    paths = tuple(sample_paths(out, rollout.cache.batch)) if pixels else (out,)
    done = rollout.next_chunk
    if saved is not None and saved.finished and chunks is not None and done >= chunks:
        say(f"{out} is complete already: {counted(done, 'chunk')}")
        return Recorded(done, saved.marks[0].frames, paths, False)
    tail = saved.tail if saved else None
    writer = VideoWriter(
        out, decoder, fps, rollout.cache.batch, _metadata(rollout, fps), saved and saved.marks
    )
    if pixels and tail is not None:
        decoder.warm_up(tail)
    context = decoder.context_frames if pixels else 0

    def keep(finished: bool) -> None:
        if save_every:
            save(state_path(out), rollout, known, writer.marks, tail, finished)

    finished = False
    try:
        with _bar(rollout, chunks) as bar, _asked_to_stop(say) as stop:
            start, made = time.perf_counter(), 0
            while (chunks is None or rollout.next_chunk < chunks) and not stop():
                chunk = rollout.advance()
                made += writer.write(chunk.latents)
                tail = kept_tail(tail, chunk.latents, context)
                last = rollout.next_chunk == chunks or stop()
                if save_every and (last or rollout.next_chunk % save_every == 0):
                    keep(False)
                bar.set_postfix_str(
                    f"{made / (time.perf_counter() - start):.3g} frames/s, "
                    f"cache {rollout.cache.nbytes / 1e6:.3g} MB",
                    refresh=False,
                )
                bar.update()
            finished = chunks is not None and rollout.next_chunk >= chunks
    except BaseException:
        with contextlib.suppress(UserError):
            writer.close(False)
        raise
    writer.close(finished)
    if finished:
        keep(True)
    return Recorded(rollout.next_chunk, writer.marks[0].frames, paths, not finished)


def _restored(
    path: Path, rollout: Rollout, facts: Mapping[str, Any], say: Callable[[str], object]
) -> Saved | None:
    if not path.exists():
        say(f"there is no saved state {path.name}: starting at the first chunk")
        return None
    saved = load(path, rollout, facts)
    say(f"going on after chunk {saved.next_chunk - 1}")
    return saved


def _metadata(rollout: Rollout, fps: Fraction) -> dict[str, str]:
    return {
        "kind": "mla-study latents",
        "model": rollout.model.config.name,
        "seed": str(rollout.config.seed),
        "fps": str(float(fps)),
    }


def _bar(rollout: Rollout, chunks: int | None) -> tqdm[Any]:
    return tqdm(total=chunks, initial=rollout.next_chunk, unit="chunk", disable=None)


@contextmanager
def _asked_to_stop(say: Callable[[str], object]) -> Generator[Callable[[], bool]]:
    """A question that answers whether SIGINT came; outside the main thread it never does."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("finishing this chunk; Ctrl-C once more stops at once")

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def latent_frames(seconds: float, fps: float, stride: int) -> int:
    """Latent frames whose video is at least so long: f of them make 1 + stride (f - 1) frames.

    Raises:
        UserError: no positive length.
    """
    if not seconds > 0 or not fps > 0:
        raise UserError(f"{seconds} seconds at {fps} frames a second make no video")
    frames = Fraction(seconds) * Fraction(fps)
    return max(1, -(-(frames - 1) // stride) + 1)
