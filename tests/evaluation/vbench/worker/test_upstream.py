"""What the worker relies on in VBench's code: flaws it works around, and rules it hands on."""

from __future__ import annotations

from pathlib import Path

import pytest
from vbench_worker import WORKER, direct, interpreter, shifted

pytestmark = pytest.mark.slow

PATCHES = """
import contextlib, inspect, json
import vbench.human_action as module
import vbench.cli.static_filter as static
made = []
class Model:
    def to(self, device): return self
    def load_state_dict(self, state, strict): made.append(strict)
    def eval(self): pass
class Torch:
    def __getattr__(self, name): return getattr(torch, name)
    def load(self, *a, **k): return {}
torch, module.torch = module.torch, Torch()
module.create_model = lambda *a, **k: Model()
for _ in range(2):
    with contextlib.suppress(ZeroDivisionError):
        module.human_action("nowhere", [], "cpu")
source = inspect.getsource(static.StaticFilter.load_model)
print(json.dumps({"loads": made, "device": static.DEVICE, "mapped": "map_location" in source}))
"""
OBJECTS = f"""
import importlib, importlib.util, json, sys, types
stub = types.ModuleType("vbench.third_party.grit_model")
stub.DenseCaptioning = object
sys.modules[stub.__name__] = stub
spec = importlib.util.spec_from_file_location(
    "w", {str(WORKER / "__init__.py")!r}, submodule_search_locations=[{str(WORKER)!r}])
sys.modules["w"] = importlib.util.module_from_spec(spec)
judge = importlib.import_module("w.objects").judge
class Detector:
    def __init__(self, *found): self.found = found
    def run_caption_tensor(self, frame):
        if isinstance(self.found[0], Exception): raise self.found[0]
        return [list(item) for item in self.found[0]], None
def ask(dimension, prompt, auxiliary, *found):
    compare = getattr(importlib.import_module("vbench." + dimension), dimension)
    info = dict(prompt=prompt, auxiliary_info=auxiliary)
    try:
        return judge(compare, Detector(*found), info, sys.argv[1], "cpu", 5)
    except Exception as error:
        return repr(error)
car, cat = ("a red car", [0, 0, 10, 10], ["car"]), ("cat", [40, 0, 50, 10], ["cat"])
named = [("car", car[1], ["car"]), ("cat", cat[1], ["cat"])]
broken = RuntimeError("no kernel")
one, both = dict(object="car"), dict(object="car and cat")
left = dict(object_a="car", object_b="cat", relationship="on the left of")
left = dict(spatial_relationship=left)
print(json.dumps([
    ask("object_class", "a car", one, [car]), ask("object_class", "a car", one, []),
    ask("object_class", "a car", one, broken),
    ask("multiple_objects", "a car and a cat", both, [(0, 0, ["car", "cat"])]),
    ask("multiple_objects", "a car and a cat", both, broken),
    ask("spatial_relationship", "a car on the left of a cat", left, named),
    ask("color", "a red car", dict(color="red"), [car]),
    ask("color", "a red car", dict(color="red"), [cat]),
    ask("color", "a red car", dict(color="red"), ZeroDivisionError("inside")),
]))
"""


def test_each_patch_is_still_needed(tmp_path: Path) -> None:
    upstream = direct(interpreter(), tmp_path, PATCHES)
    # human_action builds and loads its model in every call, and takes any file
    assert upstream["loads"] == [False, False]
    # the static filter knows one device
    assert upstream["device"] == "cuda" and not upstream["mapped"]


def test_detections_are_judged_by_vbench_and_exceptions_are_none_of_them(tmp_path: Path) -> None:
    video = shifted(tmp_path / "a-0.mp4", 5, (0, 0))
    found, none, broken, both, both_broken, left, red, no_car, odd = direct(
        interpreter(), tmp_path, OBJECTS, str(video)
    )
    # 16 frames are looked at, however few there are
    assert found == {"value": 1.0, "terms": 16, "frames": 5}
    assert none == {"value": 0.0, "terms": 16, "frames": 5}
    assert broken == both_broken == "RuntimeError('no kernel')"
    assert both["value"] == 1.0 and both["terms"] == 16
    assert left == {"value": 1.0, "terms": 16, "frames": 5}
    assert red == {"value": 1.0, "terms": 1, "frames": 5}
    assert no_car == {"value": 0.0, "terms": 0, "frames": 5, "counted": False}
    assert odd == "ZeroDivisionError('inside')"
