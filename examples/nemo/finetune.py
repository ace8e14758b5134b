"""Fine-tune through NeMo's own ``llm.finetune``, with the method chosen in YAML.

    torchrun --nproc-per-node 2 -m examples.nemo.finetune --folder /tmp/run [key=value ...]

The model is tiny and the data random, so that it runs anywhere. ``--cpu`` runs without a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

YAML = Path(__file__).with_name("bdlora.yaml")
SEQUENCE, VOCABULARY = 16, 96


def main() -> None:
    """Train an adapter for a random base model; a real one is given with ``resume``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("overrides", nargs="*", help="such as peft.bdlora.rank=16")
    args = parser.parse_args()
    if args.cpu:
        from tests.fakes.nemo_on_cpu import prepare

        prepare()
    from nemo.collections import llm
    from omegaconf import OmegaConf

    from bdlora_megatron.nemo import build_peft

    settings = OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist(args.overrides))
    parts = pieces(args.folder, "adapter", steps=args.steps, cpu=args.cpu)
    llm.finetune(**parts, peft=build_peft(settings.peft), tokenizer="data")


def pieces(folder: Path, name: str, *, steps: int, cpu: bool) -> dict[str, Any]:
    """What ``llm.train`` and ``llm.finetune`` both take."""
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    tokenizer = NullTokenizer(VOCABULARY - 1)
    config = llm.LlamaConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        seq_length=SEQUENCE,
        make_vocab_size_divisible_by=8,
        params_dtype=torch.float32,
        use_cpu_initialization=cpu,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **({"transformer_layer_spec": local_spec} if cpu else {}),
    )
    trainer = nl.Trainer(
        accelerator="cpu" if cpu else "gpu",
        devices=2,
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=2,
            ddp="megatron",
            setup_optimizers=True,
            ckpt_async_save=False,
        ),
        plugins=nl.MegatronMixedPrecision(precision="32"),
    )
    return {
        "model": llm.LlamaModel(config, tokenizer=tokenizer),
        "data": llm.MockDataModule(
            seq_length=SEQUENCE,
            tokenizer=tokenizer,
            global_batch_size=2,
            micro_batch_size=2,
            create_attention_mask=True,
            num_workers=0,
        ),
        "trainer": trainer,
        "log": nl.NeMoLogger(log_dir=str(folder), name=name, use_datetime_version=False),
        "optim": nl.MegatronOptimizerModule(
            config=OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=False)
        ),
    }


def local_spec(config: Any) -> Any:
    """Megatron-Core's layers without Transformer Engine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(normalization=config.normalization)


if __name__ == "__main__":
    main()
