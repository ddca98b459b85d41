"""Second moments of a model's activations: what hooks collect, and the file that carries them.

d channels of an input, T tokens, W [m, d] an operator on that input, C = E[x x^T] [d, d] uncentred.
On inputs of second moment C the best rank-k stand-in for W is a cut of the spectrum of W C^(1/2).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg

from mla_study.checkpoints.formats.safetensors_file import SafetensorsFile
from mla_study.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

KEY_LIKE = re.compile(
    r"(^|[._])(k|key|keys|wk|qkv|kv|to_k|to_kv|to_qkv|add_k_proj|k_proj|k_lin|k_linear|key_proj"
    r"|qkv_proj|in_proj|c_attn|query_key_value|self_attn|attn_k|attn_qkv|Wqkv|kv_proj"
    r"|kv_a_proj_with_mqa|kv_down)$"
)
"""Names of modules whose input is what the keys are made of: the default targets."""

_TOKENS_A_STEP = 4096


class Covariances(dict[str, np.ndarray]):
    """Module name -> uncentred second moment of its input, float64 [d, d], and ``tokens``."""

    def __init__(self, matrices: Mapping[str, np.ndarray], tokens: Mapping[str, int]) -> None:
        super().__init__(matrices)
        self.tokens: dict[str, int] = dict(tokens)


def collect_covariance(
    module: nn.Module,
    inputs: Iterable[Any],
    targets: str | re.Pattern[str] | Callable[[str], bool] | None = None,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], torch.Tensor | None] | None = None,
) -> Covariances:
    """Run a model over inputs and average x x^T over the tokens that enter the chosen modules.

    Args:
        module: any nn.Module; it runs in eval mode without gradients and gets its mode back.
        inputs: batches, each passed to ``forward``.
        targets: a regular expression searched in module names, or a predicate on them; None takes
            the Linear, Conv1D and MultiheadAttention modules that ``KEY_LIKE`` names.
        forward: (module, batch) -> anything. None: a mapping is passed as keywords, a tuple or
            list as positional arguments, anything else as the one argument.
        mask: batch -> bool [batch, tokens] of the tokens that count (for padding), or None for all.
            It applies to inputs whose leading shape is the mask's.

    Returns:
        one float64 [d, d] a module, symmetric, keyed by the name in ``module.named_modules()``.
        Sums are formed in float64 on the inputs' device; modules that take one input object one
        after the other (q, k and v) share its product.

    Raises:
        UserError: no module matches, a module never ran, has no tensor input, changes its width,
            or its input holds NaN or Inf.
    """
    import torch

    chosen = _choose(module, targets)
    collector = _Collector()
    modes = [(part, part.training) for part in module.modules()]
    handles = [
        part.register_forward_pre_hook(collector.hook(name), with_kwargs=True)
        for name, part in chosen.items()
    ]
    try:
        module.eval()
        with torch.no_grad():
            for batch in inputs:
                collector.mask = None if mask is None else mask(batch)
                (forward or _call)(module, batch)
                collector.last = None
    finally:
        for handle in handles:
            handle.remove()
        for part, training in modes:
            part.training = training
    silent = [name for name in chosen if not collector.tokens.get(name)]
    if silent:
        raise UserError(
            f"no tokens reached module '{silent[0]}' ({len(silent)} of {len(chosen)} modules saw "
            "none): give inputs that run it, or narrow the targets"
        )
    return Covariances({name: collector.mean(name) for name in chosen}, collector.tokens)


def _choose(
    module: nn.Module, targets: str | re.Pattern[str] | Callable[[str], bool] | None
) -> dict[str, nn.Module]:
    named = dict(module.named_modules())
    if targets is None:
        chosen = {n: p for n, p in named.items() if KEY_LIKE.search(n) and _takes_vectors(p)}
    elif callable(targets):
        chosen = {n: p for n, p in named.items() if targets(n)}
    else:
        pattern = re.compile(targets)
        chosen = {n: p for n, p in named.items() if pattern.search(n)}
    if not chosen:
        seen = [n for n, p in named.items() if _takes_vectors(p)]
        raise UserError(
            f"no module of {type(module).__name__} matches the targets: name some projections, "
            f"such as {', '.join(seen[:6]) or 'none (it has no linear layer)'}"
        )
    return chosen


def _takes_vectors(part: nn.Module) -> bool:
    from torch import nn

    return isinstance(part, nn.Linear | nn.MultiheadAttention) or type(part).__name__ == "Conv1D"


def _call(module: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


class _Collector:
    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.mask: torch.Tensor | None = None
        self.last: tuple[torch.Tensor, int, torch.Tensor, int] | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input_of(part, args, kwargs)
            if x is None or x.ndim < 1:
                raise UserError(f"module '{name}' is called without a tensor: choose other targets")
            # The version tells an input that was changed in place since.
            version = -1 if x.is_inference() else x._version
            last = self.last
            if last is None or last[0] is not x or last[1] != version or version < 0:
                last = (x, version, *self._second_moment(x))
                self.last = last
            _, _, product, count = last
            known = self.sums.get(name)
            if known is None:
                self.sums[name], self.tokens[name] = product.clone(), count
                return
            if known.shape != product.shape:
                raise UserError(
                    f"module '{name}' saw inputs of {known.shape[0]} and of {product.shape[0]} "
                    "channels: choose other targets"
                )
            known += product
            self.tokens[name] += count

        return see

    def _second_moment(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        import torch

        mask = self.mask
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.to(device=x.device, dtype=torch.bool)]
        rows = x.reshape(-1, x.shape[-1])
        if rows.device.type == "mps":  # it has no float64
            rows = rows.cpu()
        total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for part in rows.split(_TOKENS_A_STEP):
            wide = part.to(torch.float64)
            total.addmm_(wide.T, wide)
        return total, rows.shape[0]

    def mean(self, name: str) -> np.ndarray:
        matrix = self.sums.pop(name).cpu().numpy() / self.tokens[name]
        if not np.isfinite(matrix).all():
            raise UserError(
                f"the input of module '{name}' holds NaN or Inf: check model and inputs"
            )
        return (matrix + matrix.T) / 2


def _input_of(
    part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    import torch
    from torch import nn

    if isinstance(part, nn.MultiheadAttention):
        key = args[1] if len(args) > 1 else kwargs.get("key")
        return key if isinstance(key, torch.Tensor) else None
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)


def save_covariance(path: str | Path, covariances: Covariances | Mapping[str, np.ndarray]) -> None:
    """Write second moments as float64 safetensors, to a temporary name first, then renamed.

    Args:
        path: the file to make or replace.
        covariances: module name -> [d, d]; the token counts, where known, go into the metadata.

    Raises:
        UserError: nothing to write, or the disk refuses.
    """
    from safetensors.numpy import save_file

    target = Path(path)
    if not covariances:
        raise UserError(f"no covariance to write to {target}: collect some first")
    tokens = covariances.tokens if isinstance(covariances, Covariances) else {}
    tensors = {k: np.ascontiguousarray(v, dtype=np.float64) for k, v in covariances.items()}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"tokens": json.dumps(tokens, sort_keys=True)})
        temporary.replace(target)
    except Exception as error:
        # safetensors reports a full disk by an exception of its own.
        raise UserError(f"cannot write {target}: {error}; give a writable place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def covariance_names(path: str | Path) -> list[str]:
    """Names of the second moments in a file, sorted; UserError where it is no such file."""
    with _open(Path(path)) as file:
        return sorted(file.tensors)


def load_covariance(path: str | Path, names: Collection[str] | None = None) -> Covariances:
    """Read second moments that :func:`save_covariance` or anybody else wrote as safetensors.

    Args:
        path: the file.
        names: which to read (and check); None reads all.

    Returns:
        name -> float64 [d, d], symmetric. ``tokens`` is empty where the file does not tell.

    Raises:
        UserError: unreadable file, unknown name, or a tensor that is not float32 or float64, not
            square, not finite, not symmetric, or has eigenvalues below 0 beyond rounding; all name
            the file.
    """
    source = Path(path)
    with _open(source) as file:
        stored = list(file.tensors)
        wanted = sorted(stored) if names is None else list(names)
        missing = [name for name in wanted if name not in stored]
        if missing or not wanted:
            what = f"'{missing[0]}'" if missing else "any tensor"
            raise UserError(
                f"{source} does not hold {what}: it has {', '.join(stored[:6]) or 'none'}"
            )
        matrices = {name: _checked(source, name, _tensor(file, source, name)) for name in wanted}
        tokens = _token_counts(file.metadata, wanted)
    return Covariances(matrices, tokens)


@contextlib.contextmanager
def _open(source: Path) -> Generator[SafetensorsFile]:
    try:
        file = SafetensorsFile(str(source))
    except UserError as error:
        raise UserError(
            f"{source} cannot be read as safetensors ({error}): give a file of covariances"
        ) from error
    try:
        yield file
    finally:
        file.close()


def _tensor(file: SafetensorsFile, source: Path, name: str) -> np.ndarray:
    stored = file.tensors[name].dtype
    if stored not in ("F32", "F64"):
        raise UserError(f"{source}: tensor '{name}' is {stored}, and a covariance needs F32 or F64")
    return file.read(name)


_LARGEST = 1e150  # its square is still a number


def _checked(source: Path, name: str, matrix: np.ndarray) -> np.ndarray:
    def bad(what: str) -> UserError:
        return UserError(
            f"{source}: tensor '{name}' {what}, so it is no covariance: collect it anew"
        )

    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise bad(f"has shape {list(matrix.shape)} and not [d, d]")
    tolerance = 1e-10 if matrix.dtype == np.float64 else 1e-5
    wide = matrix.astype(np.float64)
    if not np.isfinite(wide).all():
        raise bad("holds NaN or Inf")
    top = float(np.abs(wide).max())
    if top > _LARGEST:
        raise bad(f"holds values up to {top:.3g}, whose products overflow")
    if float(np.abs(wide - wide.T).max()) > tolerance * top:
        raise bad("is not symmetric")
    wide = (wide + wide.T) / 2
    # Cholesky of a matrix lifted by the rounding allowed: a tenth of the cost of its eigenvalues.
    lifted = np.array(wide, order="F")
    lifted[np.diag_indices_from(lifted)] += tolerance * top * wide.shape[0] ** 0.5
    try:
        if top > 0:
            scipy.linalg.cholesky(lifted, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise bad("has negative eigenvalues") from error
    return wide


def _token_counts(metadata: Mapping[str, Any], names: Collection[str]) -> dict[str, int]:
    try:
        counts = json.loads(metadata.get("tokens", "{}"))
        return {name: int(counts[name]) for name in names if name in counts}
    except (ValueError, TypeError):
        return {}
