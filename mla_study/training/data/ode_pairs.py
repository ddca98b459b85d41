"""ODE trajectories in Self-Forcing's LMDB layout.

``latents_shape`` says ``N S F C h w`` in ASCII; row i has ``latents_{i}_data``, float16 states from
noise to clean, and ``prompts_{i}_data``, UTF-8. A folder of several such databases counts as one,
by name. Shapes: S states, F latent frames, C channels, h x w latent, T text tokens, E channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.errors import UserError
from mla_study.rollout.prompts import Encoder
from mla_study.training.batch import Batch
from mla_study.training.data.order import place
from mla_study.training.data.texts import ready


class OdePairs:
    """The trajectories of an LMDB; as data of a run, their clean ends.

    Args:
        shape: (C, F, h, w) of the clips wanted; longer ones are cut behind.

    Raises:
        UserError: the package lmdb is absent, there is no such database, or it does not fit.
    """

    def __init__(
        self, folder: Path, encode: Encoder, shape: tuple[int, int, int, int], seed: int = 0
    ) -> None:
        try:
            import lmdb
        except ImportError:
            raise UserError("reading an LMDB needs the package lmdb: pip install lmdb") from None
        self.folder, self.shape, self.seed = folder, shape, seed
        self._rows: list[tuple[Any, tuple[int, ...], int]] = []
        for part in sorted(path.parent for path in folder.rglob("data.mdb")):
            try:
                base = lmdb.open(
                    str(part), readonly=True, lock=False, readahead=False, meminit=False
                )
            except lmdb.Error as error:
                raise UserError(f"{part} cannot be opened as an LMDB ({error})") from None
            count, states = self._states(base, part)
            self._rows += [(base, states, row) for row in range(count)]
        if not self._rows:
            raise UserError(f"{folder} holds no trajectory (data.mdb with latents): give another")
        self.captions = [self._get(i, "prompts").decode("utf-8") for i in range(len(self._rows))]
        self.encode = ready(encode, self.captions)

    def _states(self, base: Any, part: Path) -> tuple[int, tuple[int, ...]]:
        with base.begin() as view:
            told = view.get(b"latents_shape")
        try:
            count, *rest = (int(word) for word in (told or b"").split())
        except ValueError:
            rest, count = [], 0
        states = (1, *rest) if len(rest) == 4 else tuple(rest)
        channels, frames, *size = self.shape
        fits = len(states) == 5 and (states[2], *states[3:]) == (channels, *size)
        if not fits or states[1] < frames:
            raise UserError(
                f"{part} has latents_shape {(told or b'').decode(errors='replace')!r}, but 'rows "
                f"states frames {channels} {size[0]} {size[1]}' with at least {frames} frames is "
                "needed here"
            )
        return count, states

    def _get(self, index: int, name: str) -> bytes:
        base, _, row = self._rows[index]
        with base.begin() as view:
            found = view.get(f"{name}_{row}_data".encode())
        if found is None:
            raise UserError(f"{base.path()} lacks {name}_{row}_data: make the LMDB anew")
        return found

    def trajectories(self, samples: Sequence[int]) -> Float[Tensor, "B S C F h w"]:
        """All states of the samples with these numbers, noise first, float32."""
        made: list[Tensor] = []
        for sample in samples:
            index = place(sample, len(self._rows), self.seed)
            base, states, row = self._rows[index]
            data = self._get(index, "latents")
            if len(data) != 2 * math.prod(states):
                raise UserError(
                    f"{base.path()}: latents_{row}_data has {len(data)} bytes, but float16 of "
                    f"{list(states)} has {2 * math.prod(states)}: make the LMDB anew"
                )
            held = torch.from_numpy(np.frombuffer(data, np.float16).reshape(states).copy())
            made.append(held[:, : self.shape[1]].transpose(1, 2).float())
        return torch.stack(made)

    def close(self) -> None:
        """Close the databases; a process may open each only once at a time."""
        for base in {id(base): base for base, _, _ in self._rows}.values():
            base.close()

    @property
    def null(self) -> Float[Tensor, "1 T E"]:
        """The empty prompt."""
        return self.encode([""]).float()

    def batch(self, samples: Sequence[int]) -> Batch:
        """The clean ends with these numbers."""
        count = len(self._rows)
        told = tuple(self.captions[place(n, count, self.seed)] for n in samples)
        return Batch(self.encode(told).float(), self.trajectories(samples)[:, -1], told)

    def facts(self) -> dict[str, Any]:
        """Number and shape of the clips, and a hash over the prompts and the first clip."""
        digest = hashlib.sha256("\n".join(self.captions).encode())
        digest.update(self._get(0, "latents"))
        held = {"clips": len(self._rows), "shape": list(self.shape), "sha256": digest.hexdigest()}
        return {"kind": "ode pairs", "seed": self.seed, **held}
