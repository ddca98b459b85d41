"""The long mode's settings as upstream's four files."""

from __future__ import annotations

from pathlib import Path

import yaml

from mla_study.evaluation.vbench.long.configs import LENGTHS, TABLES, WEIGHTS, LongConfigs


def write_yaml(configs: LongConfigs, folder: Path) -> dict[str, str]:
    """Write them; the keyword arguments by which upstream's code finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {LENGTHS: configs.clip_seconds, WEIGHTS: configs.slow_fast}
    told |= {file: dict(configs.tables[name]) for name, file in TABLES.items()}
    for file, values in told.items():
        (folder / file).write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return {
        "clip_length_config": str(folder / LENGTHS),
        "slow_fast_eval_config": str(folder / WEIGHTS),
        "sb_mapping_file_path": str(folder / TABLES["subject_consistency"]),
        "bg_mapping_file_path": str(folder / TABLES["background_consistency"]),
    }
