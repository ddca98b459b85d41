"""The worker process: ``python -m mla_study.evaluation.vbench.native REQUEST.json``."""

from __future__ import annotations

import sys

from mla_study.evaluation.vbench.native.serve import main
from mla_study.evaluation.vbench.worker.channel import die_with_driver

if __name__ == "__main__":
    die_with_driver()
    sys.exit(main(sys.argv[1:]))
