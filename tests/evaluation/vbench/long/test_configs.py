"""The long mode's settings: published values, upstream's files, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation.vbench.long.yaml_files import write_yaml

from mla_study.errors import UserError
from mla_study.evaluation.vbench.dimensions import DIMENSIONS
from mla_study.evaluation.vbench.long.configs import FILES, PUBLISHED, TABLES, load_configs

LONG = {"human_action", "temporal_style", "overall_consistency"}


def test_published_values() -> None:
    configs = load_configs()
    assert configs.source == PUBLISHED
    assert set(configs.clip_seconds) == set(DIMENSIONS)
    for name, dimension in DIMENSIONS.items():
        assert configs.clip_seconds[name] == dimension.clip_seconds == (10 if name in LONG else 2)
    for dimension, table in configs.tables.items():
        assert [score for score, _ in table] == [round(i / 100, 2) for i in range(101)]
        assert configs.weights(dimension) == (0.5, 0.5)
        assert configs.weights(dimension, dev=False) == (1.0, 0.0)
    assert dict(configs.tables["subject_consistency"])[0.5] == 0.932674917380015
    assert dict(configs.tables["background_consistency"])[0.01] == 0.873691544930448


def test_upstreams_files_say_the_same(tmp_path: Path) -> None:
    configs = load_configs()
    write_yaml(configs, tmp_path / "vbench2_beta_long" / "configs")
    again = load_configs(tmp_path)  # as a checkout of VBench
    assert again.source == str(tmp_path)
    assert again.sha256 == configs.sha256
    assert (again.clip_seconds, again.slow_fast) == (configs.clip_seconds, configs.slow_fast)
    assert again.tables == configs.tables


def test_other_values_are_read_and_change_the_hash(tmp_path: Path) -> None:
    write_yaml(load_configs(), tmp_path)
    file = tmp_path / "slow_fast_params.yaml"
    file.write_text(file.read_text().replace("w_inclip_sb: 0.5", "# earlier\nw_inclip_sb: 0.7"))
    table = tmp_path / TABLES["background_consistency"]
    table.write_text("---\n1.0: 1.0\n0: 0.00001  # unsorted\n")
    configs = load_configs(tmp_path)
    assert configs.weights("subject_consistency") == (0.7, 0.5)
    assert configs.tables["background_consistency"] == ((0.0, 1e-5), (1.0, 1.0))
    assert configs.sha256 != load_configs().sha256


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_yaml(load_configs(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=missing):
        load_configs(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("clip_length_mix.yaml", "color: 2.0\n", "no length for subject_consistency"),
        ("clip_length_mix.yaml", "color: two\n", "line 1: 'two' is no number"),
        ("slow_fast_params.yaml", "w_inclip_sb: 0.5\n", "no weight w_clip2clip_sb"),
        ("slow_fast_params.yaml", "w_inclip_sb: .nan\n", "is no number"),
        ("subject_mapping_table.yaml", "0.0: 0.0\n", "needs two different scores"),
        ("subject_mapping_table.yaml", "0.0: 0.0\n0.0: 0.1\n", "line 2: '0.0' stands there twice"),
        ("subject_mapping_table.yaml", "table:\n  0.0: 0.0\n", "is no number"),
        ("background_mapping_table.yaml", "[0, 1]\n", "is not 'name: number'"),
        ("background_mapping_table.yaml", "low: 0.0\nhigh: 1.0\n", "'low' is no number"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, file: str, text: str, words: str) -> None:
    write_yaml(load_configs(), tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_configs(tmp_path)
    assert file in str(caught.value)


def test_a_file_that_is_no_text_and_a_folder_that_is_none(tmp_path: Path) -> None:
    write_yaml(load_configs(), tmp_path)
    (tmp_path / FILES[0]).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_configs(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        load_configs(tmp_path / "absent")


def test_length_of_clips_in_both_ways(tmp_path: Path) -> None:
    configs = load_configs()
    members = ("overall_consistency", "aesthetic_quality", "imaging_quality")
    assert configs.seconds("aesthetic_quality", exact=True, members=members) == 10
    assert configs.seconds("aesthetic_quality", exact=False, members=members) == 2
    assert configs.seconds("overall_consistency", exact=True) == 2  # a video of one's own
    assert configs.seconds("overall_consistency", exact=False) == 10
    write_yaml(configs, tmp_path)
    file = tmp_path / "clip_length_mix.yaml"
    file.write_text(
        file.read_text().replace("color: 2.0", "color: 0.5").replace("scene: 2.0", "scene: 2.9")
    )
    odd = load_configs(tmp_path)
    assert odd.seconds("color", exact=False) == 0.5
    assert odd.seconds("scene", exact=True, members=("scene",)) == 2
    with pytest.raises(UserError, match="down to 0 s"):
        odd.seconds("color", exact=True, members=("color",))
