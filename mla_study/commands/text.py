"""``mla-study text``: embeddings of prompts, made once and kept in a file."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mla_study.errors import UserError, counted, tell

_SAVED_EVERY = 64


@dataclass(frozen=True)
class TextEncode:
    """Encode prompts by Wan's text encoder into a file; one that is there already is added to.

    Example: mla-study text encode prompts.txt --wan Wan2.1-T2V-1.3B --out prompts.safetensors
    """

    prompts_file: tyro.conf.Positional[Path | None] = None
    """Text file, one prompt a line; empty lines are skipped."""
    wan: Path = Path("Wan2.1-T2V-1.3B")
    """Folder of Wan2.1 in its original layout or that of diffusers; needs 11.4 GB of memory."""
    out: Path = Path("prompts.safetensors")
    """The file of embeddings."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A further prompt, such as the negative one or ''; may be repeated."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the encoder and of what is kept; Wan uses bfloat16."""
    device: str = "cpu"
    """Where the encoder runs: cpu, cuda, cuda:1."""
    batch: int = 8
    """Prompts at a time."""

    def run(self) -> int:
        """Encode what the file does not hold yet."""
        prompts = _prompts(self.prompts_file, self.prompt)
        if self.batch < 1:
            raise UserError(f"--batch is {self.batch}, but it must be at least 1")
        _check_place(self.out)

        import torch
        from tqdm import tqdm

        from mla_study.model.embeddings import embeddings, save_embeddings
        from mla_study.model.text import encoder_facts, load_text_encoder
        from mla_study.rollout.setup import usable_device

        held = embeddings(self.out) if self.out.exists() else None
        waiting = [p for p in prompts if held is None or p not in held]
        if not waiting:
            print(f"{self.out} holds {counted(len(prompts), 'prompt')} already")
            return 0
        device = usable_device(self.device)
        encoder = load_text_encoder(self.wan, getattr(torch, self.dtype), device)
        facts = encoder_facts(encoder)
        if held is not None and held.facts != facts:
            told = [k for k in facts if held.facts.get(k) != facts[k]]
            raise UserError(
                f"{self.out} was made otherwise ({', '.join(told)} differ): give another --out"
            )
        names = [] if held is None else list(held.prompts)
        rows = [] if held is None else [held.row(p).to(encoder.model.dtype) for p in names]
        if held is not None:
            held.close()
        with tqdm(total=len(waiting), unit="prompt", disable=None) as bar:
            for start in range(0, len(waiting), _SAVED_EVERY):
                group = waiting[start : start + _SAVED_EVERY]
                rows += encoder.rows(group, self.batch, bar.update)
                names += group
                save_embeddings(self.out, names, rows, facts)
        for note in encoder.notes:
            tell(note)
        print(f"{self.out}: {counted(len(waiting), 'prompt')} encoded, {len(names)} in the file")
        return 0


@dataclass(frozen=True)
class TextList:
    """Print the prompts of a file of embeddings, with their tokens.

    Example: mla-study text list prompts.safetensors
    """

    path: tyro.conf.Positional[Path]
    """A file made by mla-study text encode."""

    def run(self) -> int:
        """Print."""
        from mla_study.model.embeddings import embeddings

        found = embeddings(self.path)
        for prompt in found.prompts:
            print(f"{found.tokens(prompt):4d}  {prompt}")
        for key, value in sorted(found.facts.items()):
            print(f"{key}: {value}", file=sys.stderr)
        return 0


@dataclass(frozen=True)
class Text:
    """Embeddings of prompts: encode them into a file, list a file.

    Example: mla-study text encode --prompt "a red ball" --wan DIR --out prompts.safetensors
    """

    command: (
        Annotated[TextEncode, tyro.conf.subcommand("encode")]
        | Annotated[TextList, tyro.conf.subcommand("list")]
    )

    def run(self) -> int:
        """Run the chosen command."""
        return self.command.run()


def _prompts(path: Path | None, further: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    prompts = list(dict.fromkeys([*lines, *further]))
    if not prompts:
        raise UserError("there is no prompt: give a file with one a line, or --prompt")
    return prompts


def _check_place(out: Path) -> None:
    folder = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{out} cannot be written: give a file in a writable folder as --out")
