"""The worker process: ``python -m mla_study.evaluation.vbench.native REQUEST.json``."""

from __future__ import annotations

import sys

from mla_study.evaluation.vbench.native.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
