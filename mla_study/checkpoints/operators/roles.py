"""Which names mean which attention projection: the one table of name families.

A role is matched against the last component of a peeled tensor name (without ``.weight``), so that
``blocks.3.self_attn.k``, ``blk.3.attn_k``, ``layer.3.attention.self.key`` and
``lora_unet_blocks_3_self_attn_k`` all give the role ``k`` and a block path. To teach the table a
new family, add its component name to :data:`FAMILIES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mla_study.errors import UserError

FAMILIES: dict[str, str] = {
    "q": "q q_proj q_proj_weight query to_q wq w_q query_proj proj_q q_lin linear_q q_linear "
    "wquery q_net q_attn",
    "k": "k k_proj k_proj_weight key to_k wk w_k key_proj proj_k k_lin linear_k k_linear "
    "wkey k_net",
    "v": "v v_proj v_proj_weight value to_v wv w_v value_proj proj_v v_lin linear_v v_linear "
    "wvalue v_net",
    "o": "o o_proj out_proj to_out_0 to_out wo w_o output out out_lin linear_out proj_out proj "
    "c_proj merge dense proj_attn o_net project_out attn_out proj_x linear_proj",
    "qkv": "qkv qkv_proj c_attn in_proj in_proj_weight wqkv w_qkv to_qkv w_pack qkv_linear qkv_net "
    "att_proj qkv_x",
    # rows of one head after the other, q k v of each together
    "qkv_by_head": "query_key_value linear_qkv",
    "qkv_by_channel": "",  # q, k and v take turns row by row
    "qkv_mlp": "to_qkv_mlp_proj",  # the feed-forward's rows behind those of q, k and v
    "kv": "kv kv_proj to_kv wkv w_kv key_value kv_linear linear_kv kv_net",
    "kv_down": "kv_down kv_down_proj w_kv_down kv_a kv_a_proj kv_a_proj_with_mqa kv_a_mqa wkv_a "
    "w_dkv dkv_proj",
    "kv_up": "kv_up kv_up_proj w_kv_up kv_b kv_b_proj wkv_b w_ukv",
    "k_up": "k_up k_up_proj w_k_up k_b k_b_proj w_uk uk_proj",
    "v_up": "v_up v_up_proj w_v_up v_b v_b_proj w_uv uv_proj",
    "k_rope": "k_rope k_rope_proj w_kr w_k_rope kr_proj",
    "q_down": "q_down q_down_proj w_q_down q_a q_a_proj wq_a w_dq dq_proj",
    "q_up": "q_up q_up_proj w_q_up q_b q_b_proj wq_b w_uq uq_proj",
    "q_rope": "q_rope q_rope_proj w_qr w_q_rope qr_proj",
}
NORMS: dict[str, str] = {
    "q_norm": "norm_q q_norm q_layernorm query_norm norm_query q_ln ln_q query_layernorm",
    "k_norm": "norm_k k_norm k_layernorm key_norm norm_key k_ln ln_k key_layernorm",
    "kv_norm": "kv_norm norm_kv kv_a_layernorm kv_a_norm kv_down_norm c_kv_norm kv_layernorm",
    "q_down_norm": "q_down_norm q_a_layernorm q_a_norm c_q_norm",
}
ROLES = tuple(FAMILIES) + tuple(NORMS)
EXCLUDED = "none"  # the role of tensors that --map leaves out

_CROSS = re.compile(
    r"cross|attn2|(?<![a-z])encoder_attn|enc_?dec|encoder_decoder|context_attn|x_attn|xattn"
    r"|attn_layer2|injector",
    re.IGNORECASE,
)
_ALL_SELF = re.compile(r"motion_modules", re.IGNORECASE)  # attn2 over frames, of the frames
# only numbers that fit a layer's; digits of other scripts mean nothing here
_NUMBER = re.compile(r"(?<![A-Za-z0-9])(?:block|layer|stage)?(\d{1,6})(?![A-Za-z0-9])", re.ASCII)
_ATTENTION_OUTPUT = re.compile(r"^(?P<block>.*attention)\.output\.dense$")
_SIDE = frozenset(
    ("add", "added", "ip", "img", "image", "txt", "text", "context", "ctx", "encoder", "audio", "y")
)
_NOT_PROJECTIONS = frozenset(
    ("a", "b", "bias", "down", "f", "g", "gate", "global", "ln", "lora", "maa", "mix", "mu", "norm")
) | {"pos", "rel", "relative", "time", "up"}
_SIDE_SUFFIX = re.compile(r"^(?:to_)?(?:q|k|v|qkv|proj)(?:_proj)?_(?P<side>[a-z]+)$", re.IGNORECASE)
_SIDE_PATH = re.compile(r"(?:^|[._])(context_block|txt_attn)(?=[._]|$)")
_FLUX_SINGLE = re.compile(r"(?:^|[._])single_blocks[._]\d+$")
_ATTENTION = re.compile(r"att|mha", re.IGNORECASE)
# of linear attention, fused in orders of its own, and of what picks the keys of sparse attention
_OTHER_MODULES = re.compile(r"(?:^|[._])(?:linear_attn|indexer|compressor)(?=[._]|$)")
_INNER_LAYERS = (".linear", ".convolution")  # a projection that is a module around its layer
_LONGEST = 6  # words in the longest token of the tables


def _compile(table: dict[str, str]) -> dict[str, str]:
    return {token: role for role, tokens in table.items() for token in tokens.split()}


_TOKENS = _compile(FAMILIES)
_NORM_TOKENS = _compile(NORMS)


@dataclass(frozen=True)
class Match:
    """What a name means: its role and the path of the attention block that it belongs to.

    ``side`` marks the projections of a second stream (text beside image, image beside text).
    """

    role: str
    block: str
    side: bool = False


def _match(stem: str, tokens: dict[str, str]) -> Match | None:
    head, _, last = stem.rpartition(".")
    if last.isdigit() and head.rpartition(".")[2].lower().startswith("to_"):
        head, _, inner = head.rpartition(".")
        last = f"{inner}_{last}" if inner.lower() == "to_out" else inner
    parts = last.split("_")
    # the longest token wins: 'kv_a_proj_with_mqa' before 'mqa', 'q_proj' before 'proj'
    for cut in range(max(0, len(parts) - _LONGEST), len(parts)):
        role = tokens.get("_".join(parts[cut:]).lower())
        if role is not None:
            before = parts[cut - 1].lower() if cut else ""
            if before in _NOT_PROJECTIONS:
                return None
            path = ".".join(p for p in (head, "_".join(parts[:cut])) if p)
            return Match(role, path, before in _SIDE or bool(_SIDE_PATH.search(path)))
    beside = _SIDE_SUFFIX.match(last)
    if tokens is _TOKENS and beside and beside["side"].lower() in _SIDE:
        return Match("", head, side=True)
    return None


def match_weight(name: str) -> Match | None:
    """Role and block of a matrix, or None where its name says nothing of attention."""
    stem = name.removesuffix(".weight")
    for inner in _INNER_LAYERS:
        stem = stem.removesuffix(inner)
    output = _ATTENTION_OUTPUT.match(stem)
    if output:
        return Match("o", output["block"])
    head, _, last = stem.rpartition(".")
    if last == "linear1" and _FLUX_SINGLE.search(head):
        return Match("qkv_mlp", head)
    if last.lower() == "in_proj" and not _ATTENTION.search(head):
        return None  # of a state-space mixer
    if _OTHER_MODULES.search(head):
        return None
    return _match(stem, _TOKENS)


def match_norm(name: str) -> Match | None:
    """Role and block of a norm's gain, or None."""
    match = _match(name.removesuffix(".weight").removesuffix(".scale"), _NORM_TOKENS)
    if match is None or match.side:
        return None
    return Match(match.role, match.block.removesuffix(".norm").removesuffix(".qk_norm"))


def is_cross(block: str) -> bool:
    """Whether a block's path marks cross-attention."""
    return bool(_CROSS.search(block)) and not _ALL_SELF.search(block)


def numbers(path: str) -> tuple[int, ...]:
    """The integers that stand as components of a path: ``blocks.3.attn1`` gives (3,)."""
    return tuple(int(n) for n in _NUMBER.findall(path))


def template(path: str) -> str:
    """A path with ``*`` for the integers of :func:`numbers`: the stack that it belongs to."""
    return _NUMBER.sub(lambda m: m[0][: m.start(1) - m.start()] + "*", path)


@dataclass(frozen=True)
class MapRule:
    """One ``--map 'REGEX -> role'``; ``cross.k`` marks the block as cross-attention."""

    pattern: re.Pattern[str]
    role: str
    cross: bool
    text: str = ""

    def match(self, name: str) -> Match | None:
        """Role and block of a name that the pattern finds.

        The block is the named group ``block`` or ``layer``, else the numbers in the name.
        """
        found = self.pattern.search(name)
        if not found:
            return None
        groups = found.groupdict()
        block = groups.get("block") or groups.get("layer")
        if block is None:
            block = ".".join(map(str, numbers(name)))
        return Match(self.role, f"mapped{'.cross' if self.cross else ''}.{block}".rstrip("."))

    @property
    def named(self) -> bool:
        """Whether the pattern itself names the block."""
        return bool({"block", "layer"} & set(self.pattern.groupindex))


def parse_map(text: str) -> MapRule:
    """Parse ``'REGEX -> role'``; raises :class:`UserError` with what is wrong."""
    pattern, arrow, role = text.rpartition("->")
    role = role.strip().lower()
    cross = role.startswith("cross.")
    role = role.removeprefix("cross.").removeprefix("self.")
    if not arrow or not pattern.strip() or role not in (*ROLES, EXCLUDED):
        raise UserError(
            f"--map {text!r} is not 'REGEX -> role': the role is one of {', '.join(ROLES)} "
            f"(cross.ROLE marks cross-attention), or {EXCLUDED} to leave tensors out"
        )
    try:
        return MapRule(re.compile(pattern.strip()), role, cross, text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"--map {text!r}: mend its regular expression ({error})") from None
