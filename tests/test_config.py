"""Presets, strict JSON and stable hashes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mla_study import config
from mla_study.errors import UserError


@pytest.mark.parametrize("name", list(config.PRESETS))
@pytest.mark.parametrize("latent", [False, True])
def test_json_goes_both_ways(name: str, latent: bool, tmp_path: Path) -> None:
    made = config.preset(name, latent)
    assert config.from_json(config.to_json(made)) == made
    file = tmp_path / "config.json"
    file.write_text(config.to_json(made))
    assert config.from_json(file) == made
    assert config.config_hash(config.from_json(file)) == config.config_hash(made)


def test_hash_is_the_same_in_another_process_and_differs_between_presets() -> None:
    code = "from mla_study.config import *; print(config_hash(wan_1_3b(True)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == config.config_hash(config.wan_1_3b(True))
    hashes = {
        config.config_hash(p(latent)) for p in config.PRESETS.values() for latent in (False, True)
    }
    assert len(hashes) == 2 * len(config.PRESETS)


def test_the_paper_s_numbers() -> None:
    latent = config.wan_1_3b(latent=True)
    assert latent.latent is not None
    assert latent.latent.cached_scalars == 224
    assert 2 * latent.heads * latent.head_dim == 3072
    assert latent.window.key_frames * 1560 == 15600
    assert config.wan_14b().head_dim == config.wan_1_3b().head_dim == 128
    assert config.WindowConfig.from_local_attn_size(7, sink=1, chunk=3) == config.WindowConfig(
        1, 3, 3
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"widht": 3}', "width"),
        ('{"latent": {"d_rop": 3}}', "d_rope"),
        ('{"width": "3"}', "int is needed"),
        ('{"width": true}', "int is needed"),
        ('{"patch": [1, 2]}', "3 are needed"),
        ('{"model_type": "v2t"}', "t2v"),
        ("[1]", "needs an object"),
        ("{", "not valid JSON"),
        ('{"width": 100, "heads": 3}', "does not split"),
        ('{"window": {"chunk": 0}}', "at least 1"),
        ('{"window": {"sink": -1}}', "negative"),
        ('{"flow": {"shift": 0}}', "positive"),
        ('{"flow": {"denoise_steps": [250, 500]}}', "fall strictly"),
        ('{"latent": {"d_rope": 31, "d_nope": 97}}', "even"),
        ('{"latent": {"rope_pairs": [6, 5, 4]}}', "16"),
        ('{"latent": {"d_nope": 90}}', "heads of 128"),
        ('{"latent": {"d_c": 2000}}', "wider than its input"),
    ],
)
def test_bad_configs_are_told_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.from_json(text)


def test_a_window_that_cannot_hold_its_parts_is_refused() -> None:
    with pytest.raises(UserError, match="at least their sum"):
        config.WindowConfig.from_local_attn_size(3, sink=1, chunk=3)


def test_unknown_preset_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wan-1\.3b"):
        config.preset("wan-2b")
    assert config.preset("wan_1_3b") == config.wan_1_3b()
    with pytest.raises(UserError, match="cannot be read"):
        config.from_json(tmp_path / "absent.json")


def test_to_dict_is_plain_json() -> None:
    plain = config.to_dict(config.mini(latent=True))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["latent"]["rope_pairs"] == [2, 1, 1]
