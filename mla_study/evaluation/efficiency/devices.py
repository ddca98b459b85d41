"""Published rates of GPUs, and rates of a device from such numbers or from a calibration file.

The numbers are the vendors' data sheets: bf16 matrix products without sparsity, memory bandwidth,
memory. They bound; what a program reaches of them is the achieved fraction, told beside each plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mla_study.errors import UserError
from mla_study.kernels.latent_attention import calibrations
from mla_study.kernels.latent_attention.cost import Calibration, Rates

TERA = 1e12


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it.

    Attributes:
        bf16: FLOP/s of matrix products. bandwidth: bytes/s. memory: GB of 1e9 bytes.
        source: which product the numbers are of.
        measured: FLOP/s of large bf16 matrix products that were measured, where they were.
    """

    name: str
    bf16: float
    bandwidth: float
    memory: float
    source: str
    measured: float | None = None

    @property
    def ceiling(self) -> float:
        """The measured rate of matrix products, else the data sheet's."""
        return self.measured or self.bf16


def _card(
    name: str, tflops: float, tbytes: float, memory: float, source: str, measured: float = 0
) -> Card:
    return Card(
        name, tflops * TERA, tbytes * TERA, memory, source, measured * TERA if measured else None
    )


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        _card("A100", 312, 2.039, 80, "NVIDIA A100 80GB SXM"),
        _card("L40S", 362, 0.864, 48, "NVIDIA L40S"),
        _card("RTX4090", 165.2, 1.008, 24, "NVIDIA GeForce RTX 4090, fp32 accumulation"),
        _card("RTX5090", 209.5, 1.792, 32, "NVIDIA GeForce RTX 5090, fp32 accumulation"),
        _card("H100", 989.4, 3.35, 80, "NVIDIA H100 SXM", 798),
        _card("H200", 989.4, 4.8, 141, "NVIDIA H200 SXM"),
        _card("B200", 2250, 8.0, 180, "NVIDIA HGX B200"),
    )
}


@dataclass(frozen=True)
class Device:
    """What a plan knows of a device.

    Attributes:
        rates: at what is achieved. ceiling: FLOP/s at best, for bounds; None where it is not known.
        memory: GB. facts: where each number comes from, a sentence each, with its class.
    """

    name: str
    rates: Calibration
    memory: float
    ceiling: float | None
    facts: tuple[str, ...]


def device(
    name: str, achieved: float | None, dtype: str = "bf16", memory: float | None = None
) -> Device:
    """A device by its card's name, or by a calibration file.

    Args:
        name: one of :data:`CARDS` in any case, or the path of a file of ``mla-study calibrate``.
        achieved: share of the data sheet's rates that is reached; with a file, of the fitted ones.
            None: what the paper's own number says (a card), or all (a file).
        memory: GB in place of the card's; a calibration of an unknown device needs it.

    Raises:
        UserError: no such card or file, a share outside (0, 1], or memory that is not known.
    """
    if achieved is not None and not 0 < achieved <= 1:
        raise UserError(f"an achieved share of {achieved:g} is none: give one in (0, 1]")
    if memory is not None and not memory > 0:
        raise UserError(f"a memory of {memory:g} GB is none: give more than 0")
    card = CARDS.get(name.upper().replace(" ", "").replace("-", ""))
    if card is not None:
        return _of_card(card, PAPER_ACHIEVED if achieved is None else achieved, dtype, memory)
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(
            f"there is no device '{name}': give one of {', '.join(CARDS)}, or a file of "
            "mla-study calibrate (.json)"
        )
    return _of_file(path, 1.0 if achieved is None else achieved, dtype, memory)


PAPER_ACHIEVED = 0.28
"""What the paper's 27 FPS on an H100 at batch 1 (Table 5a) are of the card's 989 TF/s, were all of
the time spent on the transformer's 124.3 TF a chunk."""


def _of_card(card: Card, achieved: float, dtype: str, memory: float | None) -> Device:
    # below bf16 nothing is planned; fp32 runs on other units, of which nothing is said
    if dtype not in ("bf16", "fp16"):
        raise UserError(f"the cards' rates are of bf16 and fp16, not of {dtype}")
    rate, bandwidth = achieved * card.bf16, achieved * card.bandwidth
    even = Rates(rate)
    rates = Calibration(card.name, dtype, 0, rate, bandwidth, even, even)
    held = card.memory if memory is None else memory
    facts = [
        f"{card.source}: {card.bf16 / TERA:g} TF/s {dtype}, {card.bandwidth / TERA:g} TB/s, "
        f"{card.memory:g} GB (data sheet, paper-quoted)",
        f"achieved: {achieved:.0%} of both rates"
        + (
            " (what the paper's 27 FPS on an H100 at batch 1 come to; --achieved changes it)"
            if achieved == PAPER_ACHIEVED
            else " (given)"
        ),
    ]
    if card.measured is not None:
        facts.append(
            f"bounds: {card.measured / TERA:g} TF/s, large matrix products measured on such a card "
            "(no table of that run is kept here)"
        )
    else:
        facts.append("bounds: the data sheet's rate, all of it")
    if memory is not None:
        facts.append(f"memory: {memory:g} GB (given)")
    return Device(card.name, rates, held, card.ceiling, tuple(facts))


def _of_file(path: Path, achieved: float, dtype: str, memory: float | None) -> Device:
    entries = [entry for entry in calibrations.read(path) if entry.dtype == dtype]
    if not entries:
        raise UserError(f"{path} holds no rates of {dtype}: run mla-study calibrate with it")
    found = max(entries, key=lambda entry: entry.threads)
    known = next((card for key, card in CARDS.items() if key in found.device.upper()), None)
    held = memory if memory is not None else None if known is None else known.memory
    if held is None:
        raise UserError(
            f"{path} is of '{found.device}', whose memory is not known: give --memory in GB"
        )
    rates = _scaled(found, achieved)
    facts = (
        f"{found.device}: {found.gemm / TERA:.4g} TF/s {dtype} matrix products, attention "
        f"{found.reconstruct.attention / TERA:.4g} TF/s, {found.bandwidth / TERA:.4g} TB/s, "
        f"{found.threads} threads (calibration file, measured)",
        f"achieved: {achieved:.0%} of them",
        f"memory: {held:g} GB ({'given' if memory is not None else 'data sheet, paper-quoted'})",
    )
    return Device(found.device, rates, held, found.gemm, facts)


def _scaled(rates: Calibration, share: float) -> Calibration:
    def form(told: Rates) -> Rates:
        return replace(told, attention=told.attention * share)

    return replace(
        rates,
        gemm=rates.gemm * share,
        bandwidth=rates.bandwidth * share,
        reconstruct=form(rates.reconstruct),
        absorbed=form(rates.absorbed),
        absorbed_triton=None if rates.absorbed_triton is None else form(rates.absorbed_triton),
    )
