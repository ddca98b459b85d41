"""Scorers that need nothing of VBench's environment: substitutes and extras, in ours.

Started as ``python -m mla_study.evaluation.vbench.native REQUEST.json``; it speaks the workers'
protocol (:mod:`~mla_study.evaluation.vbench.native.serve`).
"""

MODULES = {
    "imaging_quality[niqe]": "mla_study.evaluation.vbench.native.niqe",
    "motion_smoothness[rife]": "mla_study.evaluation.vbench.native.smoothness",
    "clip_t": "mla_study.evaluation.vbench.native.clip_scores",
    "clip_f": "mla_study.evaluation.vbench.native.clip_scores",
    "hpsv3": "mla_study.evaluation.vbench.native.hpsv3",
}
"""Scorer -> the module whose code its values depend on."""
