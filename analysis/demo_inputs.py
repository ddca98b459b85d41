"""Real inputs for the demo weights: what enters MiniLM's attention on plain sentences."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mla_study.probes.activations import collect_covariance
from mla_study.study.demo import demo_weights

SENTENCES = Path(__file__).with_name("sentences.txt")


def minilm_covariance() -> Mapping[str, np.ndarray]:
    """Input second moment [384, 384] of each of MiniLM's six attention blocks, float64.

    All tokens of 64 sentences count, [CLS] and [SEP] too; in float64, so that another
    processor gives the same digits to the precision that is drawn.

    Raises:
        UserError: the demo package is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm asks for ipywidgets inside a notebook
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

    logging.disable_progress_bar()
    folder = demo_weights("minilm").parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").to(torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = [
            dict(tokenizer(line, return_tensors="pt"))
            for line in SENTENCES.read_text(encoding="utf-8").splitlines()
        ]
        return collect_covariance(model, batches, r"attention\.self\.key$")
    finally:
        torch.set_num_threads(threads)
