"""Fine-tune through NeMo's own ``llm.finetune``, with the method chosen in YAML.

    python -m examples.nemo.prepare --folder /tmp/run
    torchrun --nproc-per-node 2 -m examples.nemo.finetune --folder /tmp/run [key=value ...]

All processes share one model, by tensor parallelism within each of ``--pipeline-parallel`` stages.
Started again with more ``--steps``, at these or other sizes, it goes on where it ended. ``--cpu``
runs without a GPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

YAML = Path(__file__).with_name("bdlora.yaml")
SEQUENCE = 32


def main() -> None:
    """Train an adapter for ``<folder>/base`` on ``<folder>/data``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="what prepare wrote")
    parser.add_argument("--name", default="adapter", help="the run's folder below it")
    parser.add_argument("--steps", type=int, default=8, help="in all, those of earlier starts too")
    parser.add_argument("--precision", default="32", help="such as bf16-mixed")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="stages")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("overrides", nargs="*", help="such as peft.bdlora.rank=16")
    args = parser.parse_args()
    if args.cpu:
        from tests.fakes.nemo_on_cpu import prepare

        prepare()
    from nemo.collections import llm
    from omegaconf import OmegaConf

    from bdlora_megatron.nemo import build_peft

    settings = OmegaConf.merge(OmegaConf.load(YAML), OmegaConf.from_dotlist(args.overrides))
    parts = pieces(
        args.folder,
        args.name,
        steps=args.steps,
        cpu=args.cpu,
        precision=args.precision,
        stages=args.pipeline_parallel,
        sequence_parallel=args.sequence_parallel,
    )
    llm.finetune(**parts, peft=build_peft(settings))


def pieces(
    folder: Path,
    name: str,
    *,
    steps: int,
    cpu: bool,
    precision: str = "32",
    stages: int = 1,
    sequence_parallel: bool = False,
) -> dict[str, Any]:
    """The arguments of ``llm.finetune`` that are the same for every method."""
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = nl.Trainer(
        accelerator="cpu" if cpu else "gpu",
        devices=ranks,
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=ranks // stages,
            pipeline_model_parallel_size=stages,
            sequence_parallel=sequence_parallel,
            ddp="megatron",
            ckpt_async_save=False,
        ),
        plugins=precision_plugin(precision),
    )
    return {
        "model": folder / "base",
        "data": llm.FineTuningDataModule(
            dataset_root=folder / "data",
            seq_length=SEQUENCE,
            global_batch_size=8,
            micro_batch_size=4,
            num_workers=0,
        ),
        "trainer": trainer,
        "log": nl.NeMoLogger(
            log_dir=str(folder),
            name=name,
            use_datetime_version=False,
            ckpt=nl.ModelCheckpoint(
                save_last=True,
                every_n_train_steps=4,
                filename="{step}",
                # Otherwise a finished run cannot go on.
                save_optim_on_train_end=True,
            ),
        ),
        "optim": nl.MegatronOptimizerModule(
            config=OptimizerConfig(
                optimizer="adam", lr=1e-2, weight_decay=0.0, use_distributed_optimizer=False
            )
        ),
        # The base model's weights; or, where this run has a checkpoint, the run.
        "resume": nl.AutoResume(
            restore_config=nl.RestoreConfig(path=str(folder / "base")),
            resume_if_exists=True,
            resume_ignore_no_checkpoint=True,
        ),
    }


def precision_plugin(name: str) -> Any:
    """With ``bf16-mixed`` that of NeMo's recipes: sixteen-bit weights, float32 copies of them."""
    import torch
    from nemo import lightning as nl

    if name != "bf16-mixed":
        return nl.MegatronMixedPrecision(precision=name)
    return nl.MegatronMixedPrecision(
        precision=name,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )


if __name__ == "__main__":
    main()
