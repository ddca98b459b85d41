"""Scorers that need nothing of VBench's environment: substitutes and extras, in ours.

Started as ``python -m mla_study.evaluation.vbench.native REQUEST.json``; it speaks the workers'
protocol (:mod:`~mla_study.evaluation.vbench.native.serve`).
"""
