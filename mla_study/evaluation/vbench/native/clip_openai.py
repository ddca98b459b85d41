"""OpenAI's CLIP checkpoint, opened with transformers' model: the same numbers, other names."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_study.errors import UserError

_HEAD = 64  # width of a head in all of OpenAI's CLIPs
_MERGES = 49152 - 256 - 2
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PLAIN = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}


def load_openai(path: Path) -> Any:
    """The model of a file such as ``ViT-B-32.pt`` (TorchScript, or a plain dictionary).

    Raises:
        UserError: the file is damaged, or no CLIP with a vision transformer.
    """
    try:
        try:
            held = torch.jit.load(str(path), map_location="cpu").state_dict()
        except RuntimeError:
            held = torch.load(path, map_location="cpu", weights_only=True)
            held = held.get("state_dict", held)
        return from_openai(held)
    except Exception as error:
        # what a damaged file makes of the two loaders is not to be foreseen
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold OpenAI's CLIP ({what}): get it anew") from None


def from_openai(held: Mapping[str, Tensor]) -> Any:
    """transformers' model, float32, with the weights of OpenAI's names.

    Raises:
        KeyError, RuntimeError: the weights are not those of a CLIP with a vision transformer.
    """
    from transformers import CLIPConfig, CLIPModel

    named = dict[str, Tensor]()
    for name, value in held.items():
        if name in ("input_resolution", "context_length", "vocab_size"):
            continue
        named |= _renamed(name, value.float())
    vision, words = held["visual.conv1.weight"], held["token_embedding.weight"]
    grid = round((len(held["visual.positional_embedding"]) - 1) ** 0.5)
    width = words.shape[1]
    config: Any = CLIPConfig(
        projection_dim=held["text_projection"].shape[1],
        vision_config={
            **_shape(held, "visual.transformer.resblocks.", vision.shape[0]),
            "patch_size": vision.shape[2],
            "image_size": grid * vision.shape[2],
        },
        text_config={
            **_shape(held, "transformer.resblocks.", width),
            "vocab_size": words.shape[0],
            "max_position_embeddings": len(held["positional_embedding"]),
            "bos_token_id": words.shape[0] - 2,
            "eos_token_id": words.shape[0] - 1,
        },
    )
    model = CLIPModel(config)
    model.load_state_dict(named)
    return model.eval()


def _shape(held: Mapping[str, Tensor], prefix: str, width: int) -> dict[str, Any]:
    layers = {name.removeprefix(prefix).split(".")[0] for name in held if name.startswith(prefix)}
    return {
        "hidden_size": width,
        "intermediate_size": len(held[f"{prefix}0.mlp.c_fc.bias"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // _HEAD,
        "hidden_act": "quick_gelu",
    }


def _renamed(name: str, value: Tensor) -> dict[str, Tensor]:
    """One of OpenAI's parameters under transformers' names; fused q, k, v come apart."""
    if name in _PLAIN:
        return {_PLAIN[name]: value}
    if name in ("visual.proj", "text_projection"):
        return {f"{'visual' if name[0] == 'v' else 'text'}_projection.weight": value.T.contiguous()}
    module, _, kind = name.rpartition(".")
    if module in _NORMS:
        return {f"{_NORMS[module]}.{kind}": value}
    for prefix, target in _TOWERS.items():
        if name.startswith(prefix):
            layer, _, inner = module.removeprefix(prefix).partition(".")
            if kind in ("in_proj_weight", "in_proj_bias"):
                end = kind.removeprefix("in_proj_")
                parts = zip("qkv", value.chunk(3), strict=True)
                return {f"{target}{layer}.self_attn.{p}_proj.{end}": x for p, x in parts}
            return {f"{target}{layer}.{_BLOCK[inner]}.{kind}": value}
    raise KeyError(f"unknown parameter {name}")


def tokenizer(path: Path) -> Callable[[str], list[int]]:
    """A prompt to token ids by CLIP's byte pairs (``bpe_simple_vocab_16e6.txt.gz``).

    Raises:
        UserError: the file cannot be read.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _MERGES + 1]
        merges = [(left, right) for left, right in (line.split() for line in lines if line)]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} does not hold CLIP's byte pairs ({error}): get it anew") from None
    letters = _bytes_as_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [left + right for left, right in merges]
    words += [_START, _END]
    made: Any = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=merges,
            end_of_word_suffix="</w>",
            unk_token=_END,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(_PIECES), "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    start, end = len(words) - 2, len(words) - 1
    return lambda text: [start, *made.encode(text.strip()).ids, end]


def _bytes_as_letters() -> list[str]:
    """A printable letter for each byte, in the vocabulary's order: those that print come first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + index) for index in range(len(others)))]
