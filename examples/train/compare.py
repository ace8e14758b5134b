"""Hold a run's exported adapters, in PEFT, against its last checkpoint, in Megatron-Core."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from bdlora_megatron import runtime
from bdlora_megatron.models import without_padding
from bdlora_megatron.train import TrainConfig, load_config
from bdlora_megatron.train.checkpoint import checkpoints, load_checkpoint
from bdlora_megatron.train.examples import load_tokenizer
from bdlora_megatron.train.loop import ADAPTER, DENSE_ADAPTER
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.step import Stepper

_TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer"


def main() -> None:
    """Print the largest difference between logits, and how large they are."""
    parser = argparse.ArgumentParser(prog="python -m examples.train.compare", description=__doc__)
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    tokenizer = load_tokenizer(config.model.hf_path)
    ids = torch.tensor([tokenizer(_TEXT)["input_ids"]])
    trained = megatron_logits(config, ids)
    base: Any = AutoModelForCausalLM.from_pretrained(config.model.hf_path, dtype=torch.float32)
    with torch.inference_mode():
        change = (base.eval()(ids).logits - trained).abs().max()
    print(f"what training changed:  {change:.3f}")
    for name in (ADAPTER, DENSE_ADAPTER):
        folder = Path(config.checkpoint.save) / name
        if folder.is_dir():
            difference = (peft_logits(config.model.hf_path, folder, ids) - trained).abs().max()
            print(
                f"{name} in PEFT differs by  {difference:.1e}, of logits up to "
                f"{trained.abs().max():.1f}"
            )


def megatron_logits(config: TrainConfig, ids: Tensor) -> Tensor:
    """Logits ``[1, tokens, vocabulary]`` of the last checkpoint, on one rank."""
    runtime.enable_cpu()
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        with runtime.model_parallel(1):
            model, hf = build_model(config)
            stepper = Stepper(model, config)
            load_checkpoint(checkpoints(config.checkpoint.save)[-1][1], stepper)
            length = ids.shape[1]
            hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
            positions = torch.arange(length)[None]
            with torch.no_grad():
                logits = model.eval()(ids, positions, hidden, runtime_gather_output=True)
                whole: Tensor = without_padding(logits, hf)
        torch.distributed.destroy_process_group()
    return whole


def peft_logits(base_dir: str, adapter_dir: Path, ids: Tensor) -> Tensor:
    """The same of PEFT."""
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    with torch.inference_mode():
        logits: Tensor = PeftModel.from_pretrained(base, adapter_dir).eval()(ids).logits
    return logits


if __name__ == "__main__":
    main()
