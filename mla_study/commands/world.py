"""``mla-study world`` and ``mla-study score``: look at the miniature world, score its videos."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mla_study.errors import UserError, counted


@dataclass(frozen=True)
class WorldRender:
    """Render a caption of the miniature world to a video.

    Example: mla-study world render "fast red square moving right middle center on stripes"
    """

    caption: tyro.conf.Positional[str]
    """Nine words, such as 'slow blue disc moving up top left-side on night'."""
    out: Path = Path("clip.mp4")
    """What to write: .mp4, .png or a folder, .webp, .gif."""
    seed: int = 0
    """Where in its cell the sprite starts."""
    frames: int = 12
    """Frames of the video."""
    size: int = 24
    """Rows and columns of the world."""
    scale: int = 8
    """Pixels of the video a pixel of the world."""
    fps: float = 8.0
    """Frames a second."""

    def run(self) -> int:
        """Render."""
        if self.scale < 1 or not self.fps > 0:
            raise UserError(f"--scale {self.scale} and --fps {self.fps:g} must be positive")
        from mla_study.world.files import write_clip
        from mla_study.world.scenes import World, sample_scenes

        world = World(self.size, self.frames)
        scenes = sample_scenes(world, 1, self.seed, captions=[self.caption])
        write_clip(scenes, self.out, self.frames, self.scale, self.fps)
        y, x = scenes.start[0].tolist()
        print(
            f"{self.out}: {counted(self.frames, 'frame')} of {self.size} x {self.size}, each pixel "
            f"{self.scale} x {self.scale}; the sprite starts at row {y:.2f}, column {x:.2f}"
        )
        return 0


@dataclass(frozen=True)
class WorldCheck:
    """Measure how well the parser reads clips whose captions are known.

    Clean, through the codec, with noise, blurred, and without a sprite.

    Example: mla-study world check --sizes 24 --clips 32 --no-write
    """

    sizes: tuple[int, ...] = (24, 32, 64)
    """Rows and columns of the worlds."""
    clips: int = 512
    """Clips a condition."""
    frames: int = 12
    """Frames a clip."""
    seed: int = 0
    """Of the clips and the noise."""
    write: bool = True
    """Write results/data/world_parser."""

    def run(self) -> int:
        """Measure, and print each row as it comes."""
        from mla_study.study.notebooks import Project
        from mla_study.world.check import (
            CheckConfig,
            check_rows,
            render_ms,
            row_text,
            write_check,
        )
        from mla_study.world.scenes import World

        config = CheckConfig(self.sizes, self.clips, self.frames, self.seed)
        folder = Project.find().data / "world_parser" if self.write else None
        rows: list[dict[str, Any]] = []
        for row in check_rows(config):
            rows.append(row)
            print(row_text(row), flush=True)
        spent = render_ms(World())
        print(f"rendering 16 clips of 12 frames at 24 pixels takes {spent:.2f} ms")
        if folder is not None:
            write_check(rows, config, spent, folder)
            print(f"wrote {folder}", file=sys.stderr)
        return 0


@dataclass(frozen=True)
class World:
    """The miniature world: look at it, and see how well its parser reads.

    Example: mla-study world render "fast red square moving right middle center on stripes"
    """

    command: (
        Annotated[WorldRender, tyro.conf.subcommand("render")]
        | Annotated[WorldCheck, tyro.conf.subcommand("check")]
    )

    def run(self) -> int:
        """Run the chosen command."""
        return self.command.run()


@dataclass(frozen=True)
class Score:
    """Say what a video of the miniature world shows, and how well that is its caption.

    IoU and position error are against a sprite that keeps to one path from the first frame on; of a
    video longer than 12 frames they are given as well by the study's windows of 12 frames, in each
    of which the true sprite sets out anew from where it is first seen.

    Example: mla-study score clip.mp4 --caption "fast red square moving right middle center on
    stripes"
    """

    video: tyro.conf.Positional[Path]
    """A video, an animation, or a folder of PNG frames."""
    caption: str | None = None
    """What it should show (default: only say what it shows)."""
    size: int = 24
    """Rows and columns of the world; a video of a multiple of it is scaled down."""
    json: bool = False
    """Print one JSON document on stdout."""

    def run(self) -> int:
        """Parse, compare and print."""
        import json

        from mla_study.world.files import read_video
        from mla_study.world.grammar import parse_caption
        from mla_study.world.parser import parse
        from mla_study.world.report import facts_document, score_text, shown_text
        from mla_study.world.scenes import World
        from mla_study.world.score import compare
        from mla_study.world.windows import by_windows, windows_text

        world = World(self.size)
        wanted = None if self.caption is None else parse_caption(self.caption)
        video = read_video(self.video, self.size)
        parsed = parse(video, world)
        scores = None if wanted is None else compare(parsed, [wanted])
        windowed = None if wanted is None else by_windows(video, wanted, world)
        if self.json:
            document = facts_document(parsed) if scores is None else scores.clip(0)
            if windowed is not None:
                document["windows"] = windowed
            print(json.dumps({"frames": parsed.where.shape[1], **document}, indent=1))
            return 0
        print(shown_text(parsed))
        if scores is not None:
            print(score_text(scores))
        if windowed is not None:
            print(windows_text(windowed))
        return 0
