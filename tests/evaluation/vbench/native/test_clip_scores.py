"""CLIP-T and CLIP-F with small random CLIPs in the true formats, against direct computation."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.vbench.made_pictures import openai_weights

from mla_study.errors import UserError
from mla_study.evaluation.vbench.native.clip_openai import from_openai, load_openai
from mla_study.evaluation.vbench.native.clip_scores import ClipFrames, ClipPrompt, prepared
from mla_study.evaluation.vbench.native.frames import each
from mla_study.evaluation.vbench.native.scoring import Job
from mla_study.rollout.sinks import Mp4Sink

WORDS = ("<|startoftext|>", "<|endoftext|>", "red", "blue", "disc", "on", "night")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder whose ``clip_t`` is a small random CLIP with a tokenizer of seven words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPConfig(
        projection_dim=24,
        vision_config={**shape, "num_attention_heads": 4, "patch_size": 8, "image_size": 32},
        text_config={
            **shape, "num_attention_heads": 4, "vocab_size": 7, "max_position_embeddings": 6,
            "bos_token_id": 0, "eos_token_id": 1,
        },
    )  # fmt: skip
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "clip_t")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, WORDS[1]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.RobertaProcessing((WORDS[1], 1), (WORDS[0], 0))
    words.save(str(folder / "clip_t/tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty unlike frames: more than one pass, and a last one that is not full."""
    rng = np.random.default_rng(2)
    sink = Mp4Sink(tmp_path_factory.mktemp("video") / "red disc-0.mp4", Fraction(8))
    coarse = rng.integers(0, 256, (20, 6, 8, 3), dtype=np.uint8)
    sink.write(coarse.repeat(10, 1).repeat(10, 2))
    sink.close(True)
    return sink.path


def direct(weights: Path, video: Path) -> tuple[float, float]:
    """The two scores by the model's own forward pass, all at once."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(weights / "clip_t").eval()
    pixels = torch.stack([prepared(frame, 32) for frame in each(video)])
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[0, 2, 4, 1]]), pixel_values=pixels)
    frames, told = out.image_embeds, out.text_embeds[0]  # of length 1
    return float((frames @ told).mean()), float((frames[1:] * frames[:-1]).sum(1).mean())


def test_scores_are_mean_cosines(weights: Path, video: Path) -> None:
    told, alike = direct(weights, video)
    with torch.no_grad():
        prompt = ClipPrompt(Job(weights)).score(video, "red disc")
        frames = ClipFrames(Job(weights)).score(video, "")
    assert prompt.value == pytest.approx(told, abs=1e-6) and prompt.frames == 20
    assert frames.value == pytest.approx(alike, abs=1e-6)
    assert abs(told) > 0.01 and alike < 0.9995
    assert "cos(frame, prompt)" in prompt.more["definition"]


def test_a_long_prompt_is_cut_before_its_end(weights: Path, video: Path) -> None:
    scorer = ClipPrompt(Job(weights))
    with torch.no_grad():
        full = scorer.score(video, "red disc on night").value
        assert scorer.score(video, "red disc on night blue blue").value == full
        assert scorer.score(video, "red disc on blue").value != full


def test_no_prompt_and_no_weights(weights: Path, video: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the video has none"):
        ClipPrompt(Job(weights)).score(video, " ")
    with pytest.raises(UserError, match=r"605 MB.*clip_t.*354 MB.*clip_model/ViT-B-32\.pt"):
        ClipFrames(Job(tmp_path))
    (tmp_path / "clip_t").mkdir()
    with pytest.raises(UserError, match="does not hold CLIP ViT-B/32"):
        ClipFrames(Job(tmp_path))


def test_pictures_are_prepared_as_clip_does() -> None:
    frame = np.zeros((60, 90, 3), dtype=np.uint8)
    frame[:, 45:] = 255
    made = prepared(frame, 32)
    assert made.shape == (3, 32, 32)
    low, high = made[:, :, 0].mean(1), made[:, :, -1].mean(1)
    assert torch.allclose(low, torch.tensor([-1.7923, -1.7521, -1.4802]), atol=1e-3)
    assert torch.allclose(high, torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-3)
    assert prepared(frame.transpose(1, 0, 2).copy(), 32).shape == (3, 32, 32)


class Held(torch.nn.Module):
    """Parameters under dotted names, as a TorchScript file holds them."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            head, _, rest = name.partition(".")
            if not rest:
                self.register_buffer(name, value)
            elif head not in dict(self.named_children()):
                inner = {
                    n.partition(".")[2]: v for n, v in weights.items() if n.startswith(f"{head}.")
                }
                self.add_module(head, Held(inner))

    def forward(self) -> None:
        """Nothing: only the weights are wanted."""


@pytest.mark.parametrize("script", [True, False])
def test_openais_checkpoint_gives_openais_numbers(
    script: bool, fixtures: Path, tmp_path: Path
) -> None:
    recorded = json.loads((fixtures / "vbench/clip_openai.json").read_text())
    named = {name: torch.from_numpy(value) for name, value in openai_weights().items()}
    path = tmp_path / "ViT-B-32.pt"
    if script:
        torch.jit.save(torch.jit.script(Held(named)), str(path))
    else:
        torch.save(named, path)
    model = load_openai(path)
    pixels = np.random.default_rng(5).standard_normal((2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        seen = model.vision_model(pixel_values=torch.from_numpy(pixels)).pooler_output
        images = model.visual_projection(seen)
        read = model.text_model(input_ids=torch.tensor([[98, 3, 7, 11, 99]])).pooler_output
        words = model.text_projection(read)
    assert np.allclose(images[:, :8].numpy(), recorded["image"], atol=1e-5)
    assert np.allclose(words[:, :8].numpy(), recorded["text"], atol=1e-5)


def test_what_is_no_clip(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(b"none")
    with pytest.raises(UserError, match="does not hold OpenAI's CLIP"):
        load_openai(path)
    named = {name: torch.from_numpy(value) for name, value in openai_weights().items()}
    with pytest.raises(KeyError, match=r"unknown parameter visual\.layer1\.weight"):
        from_openai({**named, "visual.layer1.weight": torch.zeros(1)})
