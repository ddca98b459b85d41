"""CLIP-T and CLIP-F of a video, by CLIP ViT-B/32.

CLIP-T is the mean over all frames of the cosine between the frame's and the prompt's embedding;
CLIP-F the mean cosine of consecutive frames' embeddings. Both are plain cosines, not times 100.
Frames go through CLIP's own preparation: bicubic to 224 pixels on the shorter side, the middle
224 x 224, its mean and deviation. A prompt longer than 77 tokens is cut; CLIP-T uses the prompt
that the video is named by.

The model is ``clip_t/`` in the weights folder (transformers' layout, with its tokenizer), or else
OpenAI's ``clip_model/ViT-B-32.pt``, which VBench's own dimensions need too.

Shapes: n frames, D width of the joint space, S side of the model's pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mla_study.errors import UserError
from mla_study.evaluation.vbench.native.frames import each
from mla_study.evaluation.vbench.native.scoring import Job, Score

FOLDER = "clip_t"
CHECKPOINT = "clip_model/ViT-B-32.pt"
VOCABULARY = "ViCLIP/bpe_simple_vocab_16e6.txt.gz"
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
BATCH = 16
"""Frames a pass."""


class Clip:
    """CLIP with its tokenizer: pictures and prompts to unit vectors.

    Args:
        model: of transformers, in eval mode.
        encode: a prompt to token ids, start and end included, of any length.
    """

    def __init__(
        self, model: Any, encode: Callable[[str], list[int]], name: str, device: str = "cpu"
    ) -> None:
        self.model = model.to(device).eval()
        self.name, self._encode, self._device = name, encode, device
        self.side: int = model.config.vision_config.image_size
        self._length: int = model.config.text_config.max_position_embeddings

    def pictures(self, frames: list[UInt8[np.ndarray, "H W 3"]]) -> Float[Tensor, "n D"]:
        """Embeddings of frames, of length 1."""
        pixels = torch.stack([prepared(frame, self.side) for frame in frames]).to(self._device)
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(seen).float(), dim=-1)

    def prompt(self, text: str) -> Float[Tensor, "1 D"]:
        """Embedding of a prompt, of length 1; a long one is cut before its end."""
        ids = self._encode(text)
        if len(ids) > self._length:
            ids = [*ids[: self._length - 1], ids[-1]]
        tokens = torch.tensor([ids], device=self._device)
        read = self.model.text_model(input_ids=tokens).pooler_output
        return F.normalize(self.model.text_projection(read).float(), dim=-1)


def prepared(frame: UInt8[np.ndarray, "H W 3"], side: int) -> Float[Tensor, "3 S S"]:
    """A frame as CLIP sees it: shorter side to ``side`` (bicubic), middle square, normalised."""
    from PIL import Image

    height, width = frame.shape[:2]
    if width <= height:
        size = side, int(side * height / width)
    else:
        size = int(side * width / height), side
    picture = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    top, left = (round((n - side) / 2) for n in picture.shape[:2])
    square = torch.from_numpy(picture[top : top + side, left : left + side].copy())
    unit = square.permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (MEAN, DEVIATION))
    return (unit - mean) / deviation


def find_clip(job: Job) -> Clip:
    """The model of the weights folder.

    Raises:
        UserError: there is none, or what is there cannot be loaded.
    """
    folder, checkpoint = job.weights / FOLDER, job.weights / CHECKPOINT
    if folder.is_dir():
        return _from_folder(folder, job.device)
    if checkpoint.is_file():
        from mla_study.evaluation.vbench.native.clip_openai import load_openai, tokenizer

        vocabulary = job.file(
            VOCABULARY, "1,356,917 bytes", "the package openai-clip 1.0.1 (clip/)"
        )
        model = load_openai(checkpoint)
        return Clip(model, tokenizer(vocabulary), f"OpenAI's {checkpoint.name}", job.device)
    raise UserError(
        "CLIP ViT-B/32 is missing: put openai/clip-vit-base-patch32 of the Hugging Face hub "
        "(config.json, model.safetensors of about 605 MB, tokenizer.json) into "
        f"{folder}, or OpenAI's ViT-B-32.pt (about 354 MB, its address stands in openai/CLIP's "
        f"clip.py) at {checkpoint}"
    )


def _from_folder(folder: Path, device: str) -> Clip:
    try:
        from tokenizers import Tokenizer
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(str(folder), local_files_only=True)
        words: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except ImportError:
        raise UserError(
            "CLIP scores need the package transformers: pip install -e .[video]"
        ) from None
    except Exception as error:
        # transformers and tokenizers report a missing or damaged file in many ways
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} does not hold CLIP ViT-B/32 in transformers' layout ({what}): it needs "
            "config.json, model.safetensors and tokenizer.json of openai/clip-vit-base-patch32"
        ) from None
    return Clip(model, lambda text: list(words.encode(text).ids), folder.name, device)


class _ClipScorer:
    def __init__(self, job: Job) -> None:
        import transformers

        self._clip = find_clip(job)
        self.versions: Mapping[str, str] = {"transformers": transformers.__version__}

    def _embedded(self, path: Path) -> Iterator[Float[Tensor, "n D"]]:
        held: list[np.ndarray] = []
        for frame in each(path):
            held.append(frame)
            if len(held) == BATCH:
                yield self._clip.pictures(held)
                held = []
        if held:
            yield self._clip.pictures(held)

    def _more(self, definition: str) -> dict[str, Any]:
        return {
            "direction": "higher is better",
            "definition": definition,
            "model": f"CLIP ViT-B/32 ({self._clip.name})",
            "frames": "all",
        }


class ClipPrompt(_ClipScorer):
    """CLIP-T: how well the frames fit the prompt."""

    def score(self, path: Path, prompt: str) -> Score:
        """Mean cosine of frames and prompt. UserError: there is no prompt."""
        if not prompt.strip():
            raise UserError("CLIP-T compares with the prompt, and the video has none")
        told = self._clip.prompt(prompt)
        cosines = [piece @ told[0] for piece in self._embedded(path)]
        joined = torch.cat(cosines).double()
        return Score(
            float(joined.mean()), len(joined), self._more("mean over frames of cos(frame, prompt)")
        )


class ClipFrames(_ClipScorer):
    """CLIP-F: how alike consecutive frames are."""

    def score(self, path: Path, prompt: str) -> Score:
        """Mean cosine of consecutive frames. UserError: fewer than two frames."""
        del prompt
        frames = torch.cat(list(self._embedded(path))).double()
        if len(frames) < 2:
            raise UserError("CLIP-F needs two frames at least, and the video has one")
        cosines = (frames[1:] * frames[:-1]).sum(dim=1)
        return Score(
            float(cosines.mean()), len(frames), self._more("mean of cos(frame, next frame)")
        )
