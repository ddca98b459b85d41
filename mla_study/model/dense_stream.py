"""A dense Wan transformer run block by block, each block's weights in memory only while it runs.

Shapes: S samples, L tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mla_study.config import ModelConfig
from mla_study.model.attention import Entry
from mla_study.model.conversion_inputs import Inputs
from mla_study.model.transformer import Block, Conditioning, WanTransformer, meta_model

Read = Callable[[str], Tensor]
OnBlock = Callable[[int, dict[str, Tensor], Tensor, Tensor], None]


class _Streamed(nn.Module):
    """Block ``index``: loads its tensors, runs, shows the attention's input, lets go."""

    def __init__(self, index: int, owner: DenseStream) -> None:
        super().__init__()
        self.index = index
        self.owner = (owner,)  # in a tuple, so that it is no submodule

    def forward(self, x: Tensor, time: Tensor, pieces: Any, *_: Any) -> Tensor:
        owner = self.owner[0]
        owner.release()
        if self.index < owner.start:
            return owner.hidden if self.index == owner.start - 1 else x
        with torch.device("meta"):
            block = Block(owner.config)
        names = list(block.state_dict())
        state = {name: owner.read(f"blocks.{self.index}.{name}") for name in names}
        block.load_state_dict(state, assign=True)
        block.requires_grad_(False)
        seen: list[Tensor] = []
        block.self_attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        out = torch.empty_like(x)
        keys: list[Entry] = []
        for i in range(len(x)):
            if i < len(owner.text):  # one text may serve all
                keys = block.cross_attn.keys(owner.text[i : i + 1])
            out[i : i + 1] = block(x[i : i + 1], time[i : i + 1], pieces, keys)
        attention = {
            name.removeprefix("self_attn."): value
            for name, value in state.items()
            if name.startswith("self_attn.")
        }
        del block, state
        owner.on_block(self.index, attention, torch.cat(seen), out)
        return out


class DenseStream:
    """Runs a model over inputs in float32; after each block ``on_block`` is called.

    Args:
        config: of a dense model.
        read: a parameter by its original name, as float32.
        on_block: (index, self-attention's tensors without prefix, its inputs [S, L, d], the block's
            outputs [S, L, d]).
    """

    def __init__(self, config: ModelConfig, read: Read, on_block: OnBlock) -> None:
        self.config, self.read, self.on_block = config, read, on_block
        self.start = 0
        self.hidden = torch.empty(0)
        self.text = torch.empty(0)
        self._done: list[nn.Module] = []

    def run(
        self, inputs: Inputs, start: int = 0, hidden: Float[Tensor, "S L d"] | None = None
    ) -> None:
        """All blocks from ``start`` on; ``hidden`` is what block ``start - 1`` returned."""
        self.start, self.hidden = start, torch.empty(0) if hidden is None else hidden
        model = self._shell()
        with torch.no_grad():
            context = inputs.context
            if (context == context[:1]).all():
                context = context[:1]
            self.text = model.text_embedding(
                nn.functional.pad(context, (0, 0, 0, self.config.text_len - context.shape[1]))
            )
            nothing = Conditioning(((),) * self.config.layers)
            self._done = [model.time_projection, model.text_embedding]
            model(inputs.x, inputs.t, nothing)

    def release(self) -> None:
        """Let go of what only the first block waits for: at 14B the better part of a gigabyte."""
        while self._done:
            self._done.pop().to("meta")

    def _shell(self) -> WanTransformer:
        """The model without its blocks, which load themselves."""
        shell = meta_model(replace(self.config, layers=1))
        shell.blocks = nn.ModuleList()
        shell.load_state_dict({name: self.read(name) for name in shell.state_dict()}, assign=True)
        shell.blocks = nn.ModuleList(_Streamed(i, self) for i in range(self.config.layers))
        return shell.requires_grad_(False).eval()
