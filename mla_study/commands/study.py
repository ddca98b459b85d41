"""``mla-study study``: train and judge the miniature's students, from conversion to tables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mla_study.errors import UserError, tell

_EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Study:
    """Train dense and latent students through all stages, and judge their videos.

    ``mini``: one seed of dense, activation, spectral and random, minutes on two cores. ``full``:
    all inits, three seeds, sweeps, long rollouts, ablations and controls, hours; its tables are the
    ones the figures draw. Finished pieces are kept: the same command goes on after Ctrl-C.

    Example: mla-study study mini
    """

    which: tyro.conf.Positional[Literal["mini", "full"]] = "mini"
    """Which study."""
    store: Path = Path("runs/study")
    """Where finished pieces of work lie, by content."""
    out: Path | None = None
    """Folder for the tables (default: STORE/tables-WHICH; results/data for what figures draw)."""
    workers: int | None = None
    """Processes of one thread (default: one a core)."""
    train_teacher: bool = False
    """Train the teacher anew in place of the shipped one."""
    ship: bool = False
    """Then put teacher, dense and latent student where the package ships them."""
    tables_only: bool = False
    """Do no work; write the tables of what is done."""
    force: bool = False
    """Replace tables in the folder even by those of fewer finished pieces."""
    list_work: bool = False
    """Print the pieces of work, and which are done; do nothing."""

    def run(self) -> int:
        """Do the study, and return the exit code."""
        from mla_study.miniature.plan import stage_of, study, teacher_node
        from mla_study.miniature.publish import refuse_fewer, write_tables
        from mla_study.miniature.sheets import write_videos
        from mla_study.miniature.shipping import ship
        from mla_study.miniature.store import Store
        from mla_study.miniature.tables import summary
        from mla_study.study.runs import file_sha256
        from mla_study.world.shipped import shipped

        workers = len(os.sched_getaffinity(0)) if self.workers is None else self.workers
        if workers < 1:
            raise UserError(f"--workers is {workers}, but it must be at least 1")
        codec, teacher = shipped("codec"), None
        if self.train_teacher:
            node = teacher_node(stage_of("flow", 0), None)
        else:
            teacher = shipped("teacher")
            node = teacher_node(None, file_sha256(teacher))
        plan = study(self.which, node)
        store = Store(self.store, codec, teacher, workers)
        if self.list_work:
            for piece in plan:
                state = "done" if store.done(plan, piece.name) else "to do"
                print(f"{state:6} {piece.kind:9} {piece.name}")
            return 0
        out = self.out or self.store / f"tables-{self.which}"
        if not self.tables_only:
            if not self.force:  # said before the work, not after hours of it
                refuse_fewer(plan.nodes, plan, out, f"the {self.which} study has")
            try:
                store.run(plan, tell)
            except KeyboardInterrupt:
                tell("interrupted: the same command goes on")
                return _EXIT_INTERRUPTED
        written = write_tables(plan, store, out, self.which, self.force)
        if "scores" in written.tables:
            print(summary(written.tables["scores"]))
        else:
            print("no student is judged yet, so that there are no scores")
        print(
            f"tables of {written.pieces} of {len(plan)} pieces: "
            f"{', '.join(map(str, written.folders))}"
        )
        if self.tables_only:
            return 0
        videos = self.store / f"tables-{self.which}" / "videos"
        names = [file.name for file in write_videos(plan, store, videos)]
        print(f"all variants side by side, in {videos}: {', '.join(names)}")
        if self.ship:
            ship(plan, store)
        return 0
