"""Wan's text encoder (transformers' ``UMT5EncoderModel``) and its tokenizer.

Shapes: B prompts, T tokens of a prompt, L = 512 tokens that the transformer sees, d width (4096).
Rows beyond a prompt's own tokens are zeros, and the transformer attends to them, as Wan's does.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mla_study.checkpoints.formats.container import TensorInfo, shown
from mla_study.errors import UserError
from mla_study.model.embeddings import TEXT_LEN, padded
from mla_study.model.wan_folder import (
    TEXT_ENCODER,
    TOKENIZER,
    fill,
    find,
    open_weights,
    read_config,
)

# transformers' names -> those of models_t5_umt5-xxl-enc-bf16.pth, applied in order.
_ORIGINAL_NAMES = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.layer\.", r"blocks.\1."),
    (r"\.0\.layer_norm\.", ".norm1."),
    (r"\.1\.layer_norm\.", ".norm2."),
    (r"\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.0\.SelfAttention\.", ".attn."),
    (r"\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)


def original_text_name(name: str) -> str:
    """The name in Wan's T5 file of a parameter of transformers' ``UMT5EncoderModel``."""
    for pattern, replacement in _ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan's tokenizer cleans it: ftfy, HTML entities twice, runs of white space to one.

    Without the package ftfy that step is left out. It changes no printable ASCII; beyond that it
    makes curly quotes and full-width punctuation plain and repairs wrong encodings, see
    :func:`needs_ftfy`.
    """
    if _ftfy() is not None:
        prompt = _ftfy().fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def needs_ftfy(prompt: str) -> bool:
    """Whether ftfy is absent and might have changed this prompt."""
    plain = " ".join(prompt.split())
    return _ftfy() is None and not (plain.isascii() and plain.isprintable())


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        return None
    return ftfy


class TextEncoder:
    """UMT5 and its tokenizer.

    Attributes:
        notes: sentences about prompts that were cut or not cleaned as Wan cleans them.
        identity: SHA-256 over the encoder's small tensors: the same for the same weights and dtype
            in either layout.
    """

    def __init__(self, model: Any, tokenizer: Any, text_len: int = TEXT_LEN) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.notes: list[str] = []
        digest = hashlib.sha256()
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name or "relative_attention_bias" in name:
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
        self.identity = digest.hexdigest()
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "B L d"]:
        """Embeddings of all prompts, zero beyond each prompt's own tokens; the model's dtype."""
        return padded(self.rows(prompts), self.text_len)

    def rows(
        self,
        prompts: Sequence[str],
        batch: int = 8,
        on_done: Callable[[int], object] | None = None,
    ) -> list[Tensor]:
        """Embeddings [T, d] of each prompt without padding, the end token included.

        Args:
            prompts: as the user wrote them; they are cleaned here.
            batch: prompts at a time.
            on_done: called after each batch with its number of prompts.
        """
        made: list[Tensor] = []
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            made += self._batch([self._ids(prompt) for prompt in group])
            if on_done is not None:
                on_done(len(group))
        return made

    @torch.no_grad()
    def _batch(self, ids: list[list[int]]) -> list[Tensor]:
        device = self.model.device
        longest = max(len(row) for row in ids)
        tokens = torch.zeros(len(ids), longest, dtype=torch.long, device=device)
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(ids):
            tokens[index, : len(row)] = torch.tensor(row, device=device)
            mask[index, : len(row)] = 1
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return [hidden[index, : len(row)].clone() for index, row in enumerate(ids)]

    def _ids(self, prompt: str) -> list[int]:
        if needs_ftfy(prompt):
            self._note(
                "the package ftfy is not installed: prompts with characters beyond ASCII are not "
                "cleaned quite as Wan cleans them (pip install ftfy)"
            )
        ids: list[int] = self.tokenizer.encode(clean_prompt(prompt)).ids
        if len(ids) > self.text_len:
            self._note(
                f"the prompt {shown(prompt, 60)} has {len(ids)} tokens: only the first "
                f"{self.text_len} are used"
            )
            # The end token stays the last one, as tokenizers cut.
            ids = [*ids[: self.text_len - 1], ids[-1]]
        top = self.model.config.vocab_size
        if max(ids, default=0) >= top:
            raise UserError(
                f"the tokenizer makes token {max(ids)}, but the text encoder knows {top}: "
                "they are not of one release"
            )
        return ids

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def load_text_encoder(
    wan: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    text_len: int = TEXT_LEN,
) -> TextEncoder:
    """The text encoder and tokenizer of a Wan folder in either layout.

    Args:
        wan: the folder.
        dtype: of the weights; Wan runs its encoder in bfloat16.
        device: where it goes; on the CPU, with the stored dtype, the file's pages are used.
        text_len: tokens that the transformer sees.

    Raises:
        UserError: transformers, the weights or the tokenizer are absent, or the weights do not fit.
    """
    path = find(wan, TEXT_ENCODER)
    vocabulary = find(path.parent if path == Path(wan) else wan, TOKENIZER)
    if vocabulary.is_dir():
        vocabulary = vocabulary / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
        from transformers import UMT5Config, UMT5EncoderModel
    except ImportError:
        raise UserError(
            "encoding prompts needs the package transformers: pip install transformers"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(vocabulary))
    except Exception as error:  # the parser has no exception of its own
        raise UserError(f"{vocabulary} is no tokenizer ({error}): replace it") from None
    source = open_weights(path)
    try:
        renamed = "token_embedding.weight" in source.tensors
        if path.is_dir():
            values = read_config(path, TEXT_ENCODER)
        else:
            values = _implied_config(source.tensors, renamed, path)
        try:
            config = UMT5Config.from_dict(values)
            # Wan's softmax is computed on logits rounded to the model's dtype, as here.
            config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
            with torch.device("meta"):
                model: Any = UMT5EncoderModel(config)
        except Exception as error:  # transformers checks configs by several exceptions
            raise UserError(f"{path} has a config that makes no encoder ({error})") from None
        names = {
            name: original_text_name(name) if renamed else name
            for name, _ in model.named_parameters()
        }
        fill(model, source, names, dtype, device, unused=("encoder.embed_tokens.weight",))
        model.encoder.embed_tokens.weight = model.shared.weight
    finally:
        source.close()
    return TextEncoder(model.requires_grad_(False).eval(), tokenizer, text_len)


def _implied_config(tensors: Mapping[str, TensorInfo], renamed: bool, path: Path) -> dict[str, Any]:
    """The sizes that a bare file tells by its shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors[original_text_name(name) if renamed else name].shape

    first = "encoder.block.0.layer."
    try:
        vocabulary, width = shape("shared.weight")
        buckets, heads = shape(f"{first}0.SelfAttention.relative_attention_bias.weight")
        inner = shape(f"{first}0.SelfAttention.q.weight")[0]
        feed_forward = shape(f"{first}1.DenseReluDense.wi_0.weight")[0]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no text encoder of Wan (tensor {error})") from None
    pattern = re.compile(r"^(?:blocks|encoder\.block)\.(\d+)\.")
    layers = {int(m[1]) for name in tensors if (m := pattern.match(name))}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": feed_forward,
        "num_layers": max(layers) + 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def encoder_facts(encoder: TextEncoder) -> dict[str, str]:
    """What a file of embeddings records of the encoder: equal facts give equal embeddings."""
    ftfy = _ftfy()
    return {
        "encoder": encoder.identity,
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "text_len": str(encoder.text_len),
        "cleaning": "without ftfy" if ftfy is None else f"ftfy {ftfy.__version__}",
    }
