"""The study as a graph: what depends on what, and which work is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla_study.config import mini
from mla_study.errors import UserError
from mla_study.miniature.judge import Trial
from mla_study.miniature.plan import (
    Node,
    Plan,
    Sizes,
    Variant,
    full_study,
    judge_node,
    mini_study,
    student,
    study,
    teacher_node,
    training_nodes,
)

TEACHER = teacher_node(None, "0" * 64)


def test_the_full_study_holds_the_small_one() -> None:
    small, full = mini_study(TEACHER), full_study(TEACHER)
    for name in small.nodes:
        if small.nodes[name].kind in ("train", "convert"):
            assert small.keys[name] == full.keys[name]
    inits = {n.about["init"] for n in full if n.kind == "train"}
    assert inits == {"none", "activation", "spectral", "spectral-raw", "random"}
    for init in inits:
        seeds = {
            n.about["seed"] for n in full
            if n.kind == "train" and n.about["init"] == init and n.about["stage"] == "dmd"
        }  # fmt: skip
        assert len(seeds) >= 3
    assert {n.about["d_c"] for n in full if n.about.get("init") == "activation"} >= {
        2,
        4,
        12,
        24,
        48,
    }


def test_a_key_follows_all_that_a_result_depends_on() -> None:
    nodes = student(Variant("spectral"), Sizes(8, 0))
    base = Plan([TEACHER, *student(Variant(), Sizes()), *nodes])
    other = teacher_node(None, "1" * 64)
    moved = Plan([other, *student(Variant(), Sizes()), *nodes])
    same = [name for name in base.nodes if base.keys[name] == moved.keys[name]]
    # only what has seen no teacher stays
    assert same == ["untrained-s0", "untrained-12-s0/start"]
    changed = [
        replace(n, settings={**n.settings, "observe": [0]}) if n.name == "spectral-12-s0/cd" else n
        for n in base
    ]
    later = {name for name in base.nodes if base.keys[name] != Plan(changed).keys[name]}
    assert later == {n for n in base.nodes if n.startswith("spectral-12-s0/") and "start" not in n
                     and "/tf" not in n}  # fmt: skip


def test_students_learn_from_whom_they_should() -> None:
    tf, cd, dmd = training_nodes(Variant("random", seed=2))
    assert cd.needs["teacher"] == "dense-s2/tf" and dmd.needs["teacher"] == "teacher"
    assert (tf.needs["start"], cd.needs["start"]) == ("random-12-s2/start", tf.name)
    assert tf.about["before"] == 0 and cd.about["before"] == tf.settings["stage"]["steps"]
    assert tf.settings["stage"]["seed"] == 2
    dense = training_nodes(Variant())[0]
    assert dense.needs["start"] == "teacher"


def test_sizes_of_latents_fit_their_heads() -> None:
    for rope in (6, 8, 16, 24):
        latent = Variant("activation", d_rope=rope).latent
        assert latent is not None and latent.d_nope + latent.d_rope == mini().head_dim
    base = mini(latent=True).latent
    assert Variant("activation").latent == base
    assert Variant().latent is None
    assert Variant("random", 4, 16, 1, 500).name == "random-4-r16-t500-s1"


def test_what_is_no_plan() -> None:
    with pytest.raises(ValueError, match="needs nothing, which is not planned before it"):
        Plan([Node("a", "train", {}, {"start": "nothing"})])
    with pytest.raises(UserError, match="no study 'huge'; there are mini, full"):
        study("huge", TEACHER)
    plan = Plan([TEACHER, judge_node(TEACHER, Trial(4), "plain")])
    assert plan.folder("teacher/plain-1x").startswith("teacher.plain-1x-")
