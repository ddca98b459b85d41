"""How the models of a finished study get into the package."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mla_study.miniature.plan import Plan
from mla_study.miniature.store import MODEL, Store
from mla_study.world.shipped import FOLDER, MAKE

_STUDENTS = {"dense": "dense-s0/dmd", "latent": "activation-12-s0/dmd"}


def ship(plan: Plan, store: Store) -> None:
    """Write the plan's teacher (if it trained one) and students as float16, and ``run.json``."""
    from mla_study.checkpoints.wan.load import load_model
    from mla_study.checkpoints.wan.save import save_model
    from mla_study.study.runs import atomic_write, file_sha256

    made = dict(_STUDENTS)
    if "stage" in plan.nodes["teacher"].settings:
        made["teacher"] = "teacher"
    record: dict[str, Any] = {"made_by": MAKE, "models": {}}
    held = FOLDER / "run.json"
    if held.exists():
        record = json.loads(held.read_text())
    for name, node in made.items():
        model = load_model(store.place(plan, node) / MODEL)
        target = FOLDER / f"{name}.safetensors"
        with tempfile.TemporaryDirectory() as folder:
            # the config is inside as well, and the models of one folder differ in it
            save_model(model, Path(folder) / target.name, "latent", dtype="fp16")
            shutil.copyfile(Path(folder) / target.name, target)
        record["models"][name] = {
            "node": node,
            "key": plan.keys[node],
            "settings": plan.nodes[node].settings,
            "cpu_s": store.record(plan, node)["cpu_s"],
            "sha256": file_sha256(target),
        }
    atomic_write(held, (json.dumps(record, indent=1) + "\n").encode())
