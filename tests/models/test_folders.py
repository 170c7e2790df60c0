"""Files of a model's folder that are not what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddoq_ray.models.folders import files_read, read_json, resolve_folder


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (None, "found none"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "config.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"prior: .*{words}") as caught:
        read_json(path, "prior")
    assert "config.json" in str(caught.value) and type(caught.value) is ValueError
    if data is None:
        path.mkdir()
        with pytest.raises(ValueError, match="cannot be read: Is a directory"):
            read_json(path, "prior")


def test_one_form_of_the_weights_is_read() -> None:
    forms = ("bin", "safetensors", "fp16.bin", "fp16.safetensors", "non_ema.bin", "non_ema.safetensors")
    stable_diffusion = [
        "README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "v1-inference.yaml",
        "feature_extractor/preprocessor_config.json", "safety_checker/config.json", "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/merges.txt",
        "tokenizer/vocab.json", "unet/config.json", *(f"unet/diffusion_pytorch_model.{form}" for form in forms),
        "vae/config.json", "vae/diffusion_pytorch_model.bin",
    ]  # fmt: skip
    assert files_read(stable_diffusion) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.bin",
    ]  # fmt: skip
    alone = ["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "x/y/z.json"]
    assert files_read(alone) == ["config.json", "diffusion_pytorch_model.safetensors"]
    half = ["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert files_read(half) == half
    several = ["config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), "model.safetensors.index.json"]
    assert files_read(several) == sorted(several)


def test_a_hub_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no existing folder and could not be read.*download it"):
        resolve_folder("nobody/nothing", "prior")
