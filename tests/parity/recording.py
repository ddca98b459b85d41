"""One recording of a reference implementation: its JSON, its tensors, and what a replay found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.model.transformer import WanTransformer

CONFIG_KEYS = {
    "dim": "width",
    "num_layers": "layers",
    "num_heads": "heads",
    "ffn_dim": "ffn_width",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "eps": "eps",
    "model_type": "model_type",
}


@dataclass
class Recording:
    """``folder/name.json`` with its safetensors; ``fallback`` is searched for weights too."""

    path: Path
    fallback: Path
    read: set[str] = field(default_factory=set)
    differences: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def tensor_file(self) -> Path:
        return self.path.with_name(self.facts.get("file", f"{self.name}.safetensors"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.tensor_file)

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def meaning(self, name: str) -> str:
        return self.facts.get("tensors", {}).get(name, {}).get("meaning", "")

    @cached_property
    def config(self) -> ModelConfig:
        given = self.facts["config"]
        values = {ours: given[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in given}
        return ModelConfig(name=self.name, patch=tuple(given["patch_size"]), **values)

    @cached_property
    def model(self) -> WanTransformer:
        places = [folder / self.facts["weights"] for folder in (self.path.parent, self.fallback)]
        found = [place for place in places if place.is_file()]
        assert found, f"weights are in none of {', '.join(map(str, places))}"
        model = WanTransformer(self.config)
        model.load_state_dict(load_file(found[0]))
        return model.eval()

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Token rows and columns of latents [..., height, width]."""
        _, rows, columns = self.config.patch
        size = latents.shape[-2] // rows, latents.shape[-1] // columns
        told = self.facts.get("tokens_per_frame") or self.facts.get("rollout", {}).get(
            "tokens_per_frame"
        )
        assert told in (None, size[0] * size[1])
        return size

    def same(
        self, name: str, mine: Tensor, theirs: Tensor | None = None, most: float = 1e-4
    ) -> None:
        """Compare; the largest difference may be ``most``, the mean one a tenth of it."""
        theirs = self[name] if theirs is None else theirs
        if mine.shape != theirs.shape:
            self.failures.append(f"{name}: shape {list(mine.shape)}, not {list(theirs.shape)}")
            return
        gap = (mine.double() - theirs.double()).abs()
        largest = gap.max().item() if gap.numel() else 0.0
        self.differences[name] = max(self.differences.get(name, 0.0), largest)
        # written so that NaN fails
        if gap.numel() and not (largest <= most and gap.mean().item() <= most / 10):
            self.failures.append(
                f"{name}: largest difference {largest:.3g} (allowed {most:g}), "
                f"mean {gap.mean().item():.3g} (allowed {most / 10:g})"
            )

    def equal(self, name: str, mine: object, theirs: object) -> None:
        """Compare what must be equal."""
        self.differences.setdefault(name, 0.0)
        if mine != theirs:
            self.failures.append(f"{name}: {mine}, not {theirs}")

    def unread(self) -> list[str]:
        """Tensors that no replay looked at."""
        return sorted(set(self.tensors) - self.read)


def frames_first(x: Tensor) -> Tensor:
    """[B, C, F, height, width] to [B, F, C, height, width] and back."""
    return x.transpose(1, 2)


CPU = torch.device("cpu")
