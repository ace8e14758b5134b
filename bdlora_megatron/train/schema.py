"""The settings of a fine-tuning run, under the names that NeMo and Megatron-Bridge give them."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict
from pydantic.dataclasses import dataclass

from bdlora_megatron.decoder import DEFAULT_TARGETS, ModelClass
from bdlora_megatron.settings import (
    FORBID_UNKNOWN,
    Count,
    Flag,
    Names,
    Natural,
    Number,
    Section,
)
from bdlora_megatron.train.rag import RagOptions

__all__ = [
    "BDLoRASection",
    "CheckpointSection",
    "DatasetSection",
    "ExportSection",
    "LoRASection",
    "LoggerSection",
    "MlflowSection",
    "ModelSection",
    "OptimizerSection",
    "PeftSection",
    "RagSection",
    "RngSection",
    "SchedulerSection",
    "TrainConfig",
    "TrainSection",
    "WandbSection",
]


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class ModelSection:
    """The base model and how ranks share it."""

    hf_path: str
    """Folder of a Hugging Face Llama-family model, with its tokenizer."""
    model_class: ModelClass = "auto"
    """Megatron-Core's class of models; ``hybrid`` where it is 0.19 or newer by default."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the frozen base; that of the stored weights by default. See ``train.precision``."""
    seq_length: Annotated[Count, Field(ge=2)] = 1024
    """Tokens in a row of a batch."""
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    virtual_pipeline_model_parallel_size: Count | None = None
    """Chunks of the model on each stage, between which the pipeline interleaves."""
    context_parallel_size: Count = 1
    """Ranks that share each row; ``seq_length`` is a multiple of twice as many."""
    sequence_parallel: Flag = False
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """What is computed again in backward instead of being kept."""

    @property
    def chunks_per_stage(self) -> int | None:
        """As Megatron-Core takes it: None where stages are whole."""
        count = self.virtual_pipeline_model_parallel_size
        return None if count == 1 else count

    @property
    def microbatch_multiple(self) -> int:
        """A rank's micro-batches in a step are a multiple of this."""
        return self.pipeline_model_parallel_size if self.chunks_per_stage else 1


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class LoRASection:
    """A vanilla LoRA; read by the schemes ``lora`` and ``slora``."""

    rank: Count = 16
    alpha: Annotated[float, Strict()] | None = None
    """Numerator of the scale; twice the rank by default."""
    use_rslora: Flag = False
    dropout: Annotated[Number, Field(lt=1)] = 0.0
    target_modules: Names = DEFAULT_TARGETS
    exclude_modules: Names = ()


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class BDLoRASection:
    """A BD-LoRA; read by the scheme ``bdlora``."""

    num_blocks: Count | None = None
    """The tensor-parallel size at which the adapter will be served, or a multiple of it."""
    rank: Count | None = None
    """Total rank; 16 rounded up to a multiple of ``num_blocks`` by default."""
    match_params_of_lora_rank: Count | None = None
    """Instead of ``rank``: the largest rank with no more parameters than a LoRA of this one."""
    alpha: Annotated[float, Strict()] | None = None
    """Numerator of the scale; twice the rank by default."""
    use_rslora: Flag = False
    dropout: Annotated[Number, Field(lt=1)] = 0.0
    target_modules: Names = DEFAULT_TARGETS
    exclude_modules: Names = ()


def _token_ids(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"it is {value!r}; wanted a list of token ids")
    return value


_TOKEN_IDS = BeforeValidator(_token_ids)
#: A person may mean YAML's null by ``scheme: none``.
_NONE = BeforeValidator(lambda value: "none" if value is None else value)


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class PeftSection:
    """Which adapter is trained. Sections of schemes that are not chosen are only checked."""

    scheme: Annotated[Literal["bdlora", "lora", "slora", "none"], _NONE] = "bdlora"
    """``lora`` keeps one factor of each pair whole on every rank, ``slora`` splits both and
    communicates at the rank, ``none`` trains nothing and evaluates the base model."""
    init_from: str | None = None
    """Folder of an adapter, of any format, whose update the run starts from at step 0."""
    init_structure: Literal["exact", "truncate"] = "exact"
    """What becomes of that adapter where its rank in the run's blocks exceeds the run's: refuse it,
    or take the nearest of the run's rank and tell the error."""
    invocation_tokens: Annotated[tuple[Natural, ...], _TOKEN_IDS] = ()
    """Token ids from whose last occurrence in an example on the adapter acts (Activated LoRA); on
    every token when empty."""
    bdlora: Annotated[BDLoRASection, Section] = field(default_factory=BDLoRASection)
    lora: Annotated[LoRASection, Section] = field(default_factory=LoRASection)


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class RagSection:
    """How records of the format ``rag`` become a user's turn."""

    document: str = RagOptions().document
    """Each document: ``{text}``, and if wanted ``{title}`` and ``{number}``."""
    prompt: str = RagOptions().prompt
    """The turn: ``{documents}`` and ``{question}``."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class DatasetSection:
    """What is learnt: files of JSONL, JSON, CSV, Parquet or Arrow, one example a record."""

    train: Names
    """Files to train on."""
    validation: Names = ()
    """Files to evaluate on."""
    format: Literal["chat", "prompt_completion", "rag", "text"] = "chat"
    packing: Flag = True
    """Put several examples in a row; they don't see one another."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What becomes of examples longer than a row. Plain text is cut into rows instead; of
    ``rag`` records, ``truncate`` drops documents, never a part of the question or the answer."""
    rag: Annotated[RagSection, Section] = field(default_factory=RagSection)
    train_on: Literal["all", "last"] = "all"
    """Which answers of a conversation are learnt. ``last`` is for chat templates that write earlier
    turns differently once a later one follows."""
    chat_template_kwargs: Annotated[dict[str, Any], Section] = field(default_factory=dict)
    """Arguments of the chat template, such as ``enable_thinking: false``. Requests to the server
    should be made with the same ones."""
    ignore_keys: Names = ()
    """Keys of lines and messages to leave out, where they would be refused."""
    cache_dir: str | None = None
    """Where tokens are kept, for all ranks and later runs; in the cache of Hugging Face's
    ``datasets`` by default."""
    num_proc: Count | None = None
    """Processes that tokenize; one for each 20,000 records by default, up to one a core."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class TrainSection:
    """How long, in what portions, and when to evaluate."""

    train_iters: Natural | None = None
    """Optimizer steps; this or ``epochs``."""
    epochs: Count | None = None
    """Walks over all rows of the training data, instead of a number of steps."""
    global_batch_size: Count = 8
    """Rows in a step, over all ranks."""
    micro_batch_size: Count = 1
    """Rows that go through the model at once on a rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the factors and their products. ``bf16`` is Megatron-Core's mixed precision: base and
    factors in bfloat16, gradients summed and factors kept for the optimizer in float32."""
    eval_interval: Natural = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_iters: Natural = 0
    """Batches of ``global_batch_size`` rows in an evaluation; 0 takes all validation data."""
    early_stopping_patience: Count | None = None
    """End the run after so many evaluations in a row without a lower validation loss."""
    early_stopping_min_delta: Number = 0.0
    """How much lower a loss must be to count for that."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class OptimizerSection:
    """Megatron-Core's Adam with decoupled weight decay."""

    lr: Number = 1e-4
    min_lr: Number = 0.0
    weight_decay: Number = 0.0
    adam_beta1: Number = 0.9
    adam_beta2: Number = 0.999
    adam_eps: Number = 1e-8
    clip_grad: Number = 1.0
    """Largest norm of all gradients together; 0 for no limit."""
    use_distributed_optimizer: Flag = False
    """Split Adam's moments, and the factors' float32 copies, over data-parallel ranks."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class SchedulerSection:
    """Megatron-Core's learning-rate schedule."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_iters: Natural = 0
    lr_decay_iters: Count | None = None
    """Step at which ``min_lr`` is reached; ``train.train_iters`` by default."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class CheckpointSection:
    """Where a run keeps what it needs to go on."""

    save: str
    """The run's folder: checkpoints, metrics, loss curve, exported adapters."""
    save_interval: Natural = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""
    async_save: Flag = False
    """Train on while a process of each rank's writes a checkpoint's files."""
    keep_best: Flag = False
    """Keep the checkpoint of the lowest validation loss beside them, and its adapter as
    ``adapter-best/``."""
    resume: Flag = True
    """Go on from the newest checkpoint in ``save``, if there is one; else refuse the folder."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class WandbSection:
    """A run of Weights & Biases; needs the extra ``wandb``."""

    project: str
    name: str | None = None
    """The run's name; Weights & Biases makes one up by default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """``offline`` writes into the run's folder, for ``wandb sync``."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class MlflowSection:
    """A run of MLflow; needs the extra ``mlflow``."""

    tracking_uri: str
    """Of a server, or of a store; a password belongs into MLflow's environment variables."""
    experiment: str
    """Its name; made if need be."""
    run_name: str | None = None
    """MLflow makes one up by default."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class LoggerSection:
    """What is shown and written down."""

    log_interval: Count = 1
    """Steps between lines of metrics."""
    progress_bar: Flag = True
    tensorboard: Flag = True
    """Write TensorBoard's events; needs the extra ``train``."""
    wandb: WandbSection | None = None
    mlflow: MlflowSection | None = None
    loss_curve: Flag = True
    """Draw ``loss.png`` at the end; needs the extra ``train``."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class ExportSection:
    """Which PEFT folders are written into ``checkpoint.save`` at the end."""

    peft: Flag = True
    """``adapter/``: the adapter as it was trained."""
    dense: Flag = False
    """``adapter-dense/``: the same function as a vanilla LoRA, for engines without BD-LoRA."""


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class RngSection:
    """What chance decides."""

    seed: Natural = 1234
    """Seeds the factors, dropout and the order of the data."""


#: Read as an empty section, so that each of its keys that is missing is named.
_REQUIRED: Any = Field(default=None, validate_default=True)


@dataclass(frozen=True, kw_only=True, slots=True, config=FORBID_UNKNOWN)
class TrainConfig:
    """A fine-tuning run."""

    model: Annotated[ModelSection, Section] = _REQUIRED
    dataset: Annotated[DatasetSection, Section] = _REQUIRED
    train: Annotated[TrainSection, Section] = _REQUIRED
    checkpoint: Annotated[CheckpointSection, Section] = _REQUIRED
    peft: Annotated[PeftSection, Section] = field(default_factory=PeftSection)
    optimizer: Annotated[OptimizerSection, Section] = field(default_factory=OptimizerSection)
    scheduler: Annotated[SchedulerSection, Section] = field(default_factory=SchedulerSection)
    logger: Annotated[LoggerSection, Section] = field(default_factory=LoggerSection)
    export: Annotated[ExportSection, Section] = field(default_factory=ExportSection)
    rng: Annotated[RngSection, Section] = field(default_factory=RngSection)

    @property
    def steps(self) -> int:
        """Optimizer steps, once the data is read where ``epochs`` decide."""
        assert self.train.train_iters is not None
        return self.train.train_iters

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model between them."""
        model = self.model
        stages = model.pipeline_model_parallel_size
        return model.tensor_model_parallel_size * stages * model.context_parallel_size
