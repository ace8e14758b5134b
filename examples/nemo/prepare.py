"""Make what ``examples.nemo.finetune`` starts from: a base model in NeMo's format, and data.

    python -m examples.nemo.prepare --folder /tmp/run

The base is a random Llama of two layers in Hugging Face's format, ``<folder>/hf``, unless ``--hf``
names a model. NeMo's own ``llm.import_ckpt`` makes ``<folder>/base`` of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COLOURS = ("red", "green", "blue", "white")
THINGS = ("door", "cup", "hat", "leaf", "car", "pen")


def main() -> None:
    """Write everything below ``--folder``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hf", type=Path, help="a Llama in Hugging Face's format")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        from tests.fakes.nemo_on_cpu import prepare

        prepare()
    args.folder.mkdir(parents=True, exist_ok=True)
    hf = args.hf or make_base(args.folder / "hf")
    write_data(args.folder / "data")
    import_base(hf, args.folder / "base")


def make_base(folder: Path) -> Path:
    """Save a random Llama of two layers, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(folder: Path) -> None:
    """Questions and answers, in the files that NeMo's ``FineTuningDataModule`` looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"input": f"{colour} {thing}?", "output": f"{thing} {colour}"}) + "\n"
        for colour in COLOURS
        for thing in THINGS
    ]
    for name in ("training", "validation", "test"):
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def import_base(hf: Path, target: Path) -> Path:
    """Convert a Llama with NeMo's own importer."""
    from nemo.collections import llm

    # The importer takes all sizes from Hugging Face's config; this one only says "Llama".
    anything = llm.LlamaModel(llm.LlamaConfig(num_layers=2, hidden_size=32, num_attention_heads=4))
    return llm.import_ckpt(anything, f"hf://{hf.absolute()}", output_path=target, overwrite=True)


if __name__ == "__main__":
    main()
