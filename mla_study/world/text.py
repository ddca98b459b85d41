"""What the miniature's text encoder makes of a caption: eight word vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mla_study.config import ModelConfig
from mla_study.errors import UserError
from mla_study.rollout.prompts import WordHash
from mla_study.world.grammar import TOKENS, tokens


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions to text embeddings: a fixed random vector a word, the same on every machine.

    All words but "on" are told, which fill the miniature's eight tokens; an empty prompt gives
    zeros (what a model sees whose caption was dropped).
    """

    width: int
    length: int = TOKENS

    @classmethod
    def of(cls, config: ModelConfig) -> CaptionEncoder:
        """The encoder of a model.

        Raises:
            UserError: a model that reads fewer tokens than a caption has.
        """
        if config.text_len < TOKENS:
            raise UserError(
                f"model '{config.name}' reads {config.text_len} text tokens, but a caption of the "
                f"world needs {TOKENS}: give it text_len {TOKENS}"
            )
        return cls(config.text_dim, config.text_len)

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "B T E"]:
        """Embeddings, float32.

        Raises:
            UserError: a caption outside the grammar.
        """
        told = [" ".join(tokens(prompt)) if prompt.strip() else "" for prompt in prompts]
        return WordHash(self.width, self.length)(told)
