"""What two runs must share before their scores may be compared.

Seeds, device and number of workers are recorded beside a run and are no reason to refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

LABELS = {
    "mode": "mode",
    "prompts": "prompt file (sha256)",
    "samples": "videos a prompt",
    "size": "resolution",
    "fps": "frames a second",
    "frames": "frames",
    "vbench": "VBench",
    "patches": "patches of VBench",
    "static_filter": "static filter of temporal flickering",
    "long_configs": "configuration of the long mode",
    "aggregation": "aggregation",
    "clip_to_clip": "features between clips",
}
"""What each field is called when it differs."""
_TOLD = {
    "extended": "longer prompts (sha256)",
    "extended_by": "longer prompts by",
    "told": "what the models were told (sha256)",
}
"""Likewise, of what the models were told, see :func:`_told_otherwise`."""


@dataclass(frozen=True)
class Protocol:
    """How a run was made; every field must agree.

    Attributes:
        prompts: hash of VBench's list, of the table of prompts, or None where there are no prompts.
        extended: hash of the file with the prompts that the model was told, None for short ones
            and where no file is known.
        samples: videos a prompt (the most that a prompt has).
        size, fps, frames: what the videos have, "mixed" with the range where they differ.
        weights: scorer -> file -> SHA-256, compared for the scorers that both runs have.
        told: hash of all that was told, None where that were the prompts themselves, or where only
            its file is known. told_texts: prompt -> hash of what was told for it.
        sampled: hash of the prompts that ``vbench sample`` was given, where ``prompts`` is None.
    """

    mode: str
    prompts: str | None
    extended: str | None
    extended_by: str
    samples: int
    size: str
    fps: str
    frames: str
    vbench: str
    patches: tuple[str, ...]
    static_filter: bool
    long_configs: str | None
    aggregation: str
    clip_to_clip: str | None
    weights: Mapping[str, Mapping[str, str]]
    told: str | None = None
    told_texts: Mapping[str, str] = field(default_factory=dict[str, str])
    sampled: str | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Protocol:
        """From a run record's config. KeyError or TypeError: it holds none."""
        fields = dict(config["protocol"])
        fields["patches"] = tuple(fields["patches"])
        return cls(**fields)


def differences(first: Protocol, second: Protocol, scorers: Iterable[str]) -> list[str]:
    """Sentences, one for each thing that differs; empty where the runs may be compared.

    Args:
        scorers: those that are compared; weights of others do not matter.
    """
    found = [
        f"{label}: {field_text(getattr(first, name))} against {field_text(getattr(second, name))}"
        for name, label in LABELS.items()
        if getattr(first, name) != getattr(second, name)
    ]
    found += _told_otherwise(first, second)
    # of clips that were not sampled here nobody knows
    if None not in (first.sampled, second.sampled) and first.sampled != second.sampled:
        pair = f"{field_text(first.sampled)} against {field_text(second.sampled)}"
        found.append(f"prompts that were sampled (sha256): {pair}")
    for scorer in scorers:
        one, two = first.weights.get(scorer, {}), second.weights.get(scorer, {})
        found += [
            f"weights of {scorer}, {name}: {field_text(one.get(name))} against "
            f"{field_text(two.get(name))}"
            for name in sorted(set(one) | set(two))
            if one.get(name) != two.get(name)
        ]
    return found


def _told_otherwise(first: Protocol, second: Protocol) -> list[str]:
    """Sentences on what the models were told: by prompt where that is known, else by its file.

    Two runs of some of the same prompts each hold other texts, and yet were told alike.
    """
    one, two = first.told_texts, second.told_texts
    shared = sorted(set(one) & set(two))
    if shared:
        unlike = [prompt for prompt in shared if one[prompt] != two[prompt]]
        if not unlike:
            return []
        such = f", such as '{unlike[0]}'" if len(unlike) < len(shared) else ""
        return [
            f"{_TOLD['told']}: {field_text(first.told)} against {field_text(second.told)}, "
            f"other texts for {len(unlike)} of {len(shared)} prompts{such}"
        ]
    if first.extended is not None and first.extended == second.extended:
        return []
    return [
        f"{label}: {field_text(getattr(first, name))} against {field_text(getattr(second, name))}"
        for name, label in _TOLD.items()
        if getattr(first, name) != getattr(second, name)
    ]


def field_text(value: object) -> str:
    """A field's value, hashes cut to twelve digits."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    text = str(value)
    return text[:12] if len(text) == 64 else text


def spread(values: Iterable[str]) -> str:
    """The one value that all have, or "mixed" with the least and the greatest.

    Args:
        values: numbers, fractions, or sizes such as 832x480.

    >>> spread(["16", "16"]), spread(["30", "30000/1001", "9"])
    ('16', 'mixed (9 to 30)')
    """
    unique = sorted(set(values), key=lambda text: [Fraction(part) for part in text.split("x")])
    return unique[0] if len(unique) == 1 else f"mixed ({unique[0]} to {unique[-1]})"
