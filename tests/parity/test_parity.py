"""Our model against recorded outputs of the reference implementations.

``pytest tests/parity --fixtures DIR`` replays other recordings; weights that DIR lacks are taken
from tests/fixtures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.recording import Recording
from parity.replays import REPLAYS, replay_of


def test_recording(recording_path: Path, fixtures: Path, request: pytest.FixtureRequest) -> None:
    replay = replay_of(recording_path.stem)
    if replay is None:
        pytest.skip(f"{recording_path.stem} begins with none of {', '.join(REPLAYS)}")
    rec = Recording(recording_path, fixtures)
    with torch.no_grad():
        replay(rec)
    told = request.node.user_properties
    for name, gap in rec.differences.items():
        told.append((f"parity {rec.name} {name}", f"{gap:.2e}"))
    if rec.unread():
        told.append((f"parity {rec.name}", f"not replayed: {', '.join(rec.unread())}"))
    assert rec.differences, "the recording holds nothing that the replay knows"
    assert not rec.failures, "\n".join(rec.failures[:20])
