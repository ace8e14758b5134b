"""Fine-tune through Megatron-Bridge's own ``finetune``, with the method chosen in YAML.

    torchrun --nproc-per-node 2 -m examples.bridge.finetune --folder /tmp/run [key=value ...]

The model is tiny and the data random, so that it runs anywhere; take the config from one of
Bridge's recipes for a real model. ``--cpu`` runs where there is no GPU and no Transformer Engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

YAML = Path(__file__).with_name("bdlora.yaml")
SEQUENCE, VOCABULARY = 16, 96


def main() -> None:
    """Make a base model where there is none yet, and train an adapter for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("overrides", nargs="*", help="such as peft.bdlora.rank=16")
    args = parser.parse_args()
    base = args.folder / "base"
    # Asked before any rank can have made it.
    fresh = not base.exists()
    if args.cpu:
        from tests.fakes.bridge_on_cpu import prepare

        prepare()
    import torch
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from bdlora_megatron.bridge import AdapterExport, apply_settings

    # Bridge makes and ends the process group otherwise, and cannot make it a second time.
    torch.distributed.init_process_group("gloo" if args.cpu else "nccl")
    if fresh:
        config = tiny_config(base, cpu=args.cpu)
        apply_settings(config, YAML, ["peft.scheme=none", "train.train_iters=1"])
        pretrain(config, forward_step)
    config = tiny_config(args.folder / "adapter", cpu=args.cpu)
    config.checkpoint.pretrained_checkpoint = str(base)
    apply_settings(config, YAML, args.overrides)
    # Bridge 0.3's finetune is pretrain without a place for callbacks.
    pretrain(config, forward_step, callbacks=[AdapterExport()])
    torch.distributed.destroy_process_group()


def tiny_config(save: Path, *, cpu: bool) -> Any:
    """A Llama-like model of two layers, as a recipe would return it."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training import config as settings
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    model = GPTModelProvider(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        seq_length=SEQUENCE,
        vocab_size=VOCABULARY,
        make_vocab_size_divisible_by=8,
        position_embedding_type="rope",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        share_embeddings_and_output_weights=False,
        tensor_model_parallel_size=2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch.float32,
        use_cpu_initialization=cpu,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        cross_entropy_loss_fusion=False,
        # Transformer Engine's layers are Bridge's default.
        **({"transformer_layer_spec": local_layer_spec} if cpu else {}),
    )
    return settings.ConfigContainer(
        model=model,
        train=settings.TrainingConfig(
            train_iters=6, global_batch_size=2, micro_batch_size=2, eval_iters=0
        ),
        optimizer=settings.OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=1e-2, use_distributed_optimizer=not cpu
        ),
        scheduler=settings.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
        ),
        ddp=settings.DistributedDataParallelConfig(
            use_distributed_optimizer=not cpu,
            overlap_grad_reduce=False,
            grad_reduce_in_fp32=True,
        ),
        dataset=settings.MockGPTDatasetConfig(
            seq_length=SEQUENCE,
            random_seed=1234,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_workers=0,
            dataloader_type="single",
        ),
        logger=settings.LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1),
        checkpoint=settings.CheckpointConfig(
            save=str(save), save_interval=100, ckpt_format="torch_dist", async_save=False
        ),
        dist=settings.DistributedInitConfig(distributed_backend="gloo" if cpu else "nccl"),
    )


if __name__ == "__main__":
    main()
