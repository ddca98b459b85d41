"""What was read from one video, as text and as plain values."""

from __future__ import annotations

from typing import Any

from mla_study.world.grammar import SLOTS, Caption
from mla_study.world.parser import Facts, Parsed
from mla_study.world.score import Scores, wrong_slots


def facts_document(parsed: Parsed) -> dict[str, Any]:
    """What the first clip shows, as plain values."""
    facts = parsed.facts[0]
    return {
        "shown": {slot: getattr(facts, slot) for slot in SLOTS},
        "has_sprite": facts.has_sprite,
        "velocity": facts.velocity,
        "background_speed": facts.background_speed,
    }


def shown_text(parsed: Parsed) -> str:
    """One line: what the first clip shows."""
    facts, size = parsed.facts[0], parsed.world.size
    head = f"{parsed.where.shape[1]} frames of {size} x {size} pixels"
    if not facts.has_sprite:
        return f"{head} show no sprite on {facts.background or 'no known background'}"
    said = facts.caption
    if said is not None:
        return f"{head} show: {said}"
    known = " ".join(getattr(facts, slot) or f"(no {slot})" for slot in SLOTS)
    return f"{head} show: {known}"


def verdict_text(facts: Facts, caption: Caption) -> str:
    """A few words: all correct, or which of the caption's words are wrong."""
    wrong = wrong_slots(facts, caption)
    if not facts.has_sprite:
        return "no sprite" + ", background wrong" * ("background" in wrong)
    return f"{', '.join(wrong)} wrong" if wrong else "all correct"


def score_text(scores: Scores) -> str:
    """Lines: each fact beside the caption's, then what was measured."""
    clip, lines = scores.clip(0), list[str]()
    for slot in SLOTS:
        wanted, shown = getattr(scores.captions[0], slot), clip["shown"][slot] or "none"
        lines.append(
            f"{slot:<11}{wanted:<11}{shown:<11}{'ok' if clip['correct'][slot] else 'WRONG'}"
        )
    right = sum(clip["correct"].values())
    verdict = "all correct" if clip["all_correct"] else f"{right} of {len(SLOTS)} correct"
    lines.append(
        f"{verdict}; IoU {clip['iou']:.3f} along the path from the first frame; velocity error "
        f"{_told(clip['velocity_error'])} px a frame; position error {_told(clip['phase_error'])} "
        f"px, at the end {_told(clip['phase_error_last'])}; the colour is kept in "
        f"{clip['colour_kept']:.0%} of "
        "frames"
    )
    return "\n".join(lines)


def _told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
