from __future__ import annotations

import pytest

from mla_study.probes.names import public_name, redact


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.safetensors", "model.safetensors"),
        ("odd?name#1@home.pt", "odd?name#1@home.pt"),
        ("https://h/m.safetensors?token=a/b@c", "https://h/m.safetensors"),
        ("https://me:pass@h:8000/m.safetensors#x", "https://h:8000/m.safetensors"),
        ("https://h?sig=1", "https://h"),
        ("hf://org/name@rev/m.safetensors", "hf://org/name@rev/m.safetensors"),
        ("", ""),
    ],
)
def test_names_without_secrets(path: str, name: str) -> None:
    assert public_name(path) == name


def test_sentences_keep_their_punctuation() -> None:
    told = "https://u:p@h/a.bin?t=1: gone; see 'https://h/b?x=y', (https://h/c#d) or a?b."
    assert redact(told) == "https://h/a.bin: gone; see 'https://h/b', (https://h/c) or a?b."
    assert redact("https://h/plain.bin: it is a folder.") == "https://h/plain.bin: it is a folder."
    assert redact("read https://h/a?k=secret.") == "read https://h/a."
