"""The less common options of `embtune train`, in the sections in which `--help-more` shows them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from embtune.cli.flags import Float, Ints, MaybeInt, MaybeText, Numbers, Pairs, Switch, Texts, Values

TASKS = ("auto", "retrieval", "sts", "clustering", "classification")
"""What evaluation data can be used for while training."""


@dataclass(frozen=True)
class DataOptions:
    """Several data sets, their losses and weights, prompts, and how batches are drawn."""

    losses: Pairs = field(default_factory=dict)
    """Of several data sets, those with a loss of their own, as sts=CoSENTLoss."""
    weights: Numbers = field(default_factory=dict)
    """How often an epoch goes through a data set, as faq=2 sts=0.5; the others once."""
    loss_args: Values = field(default_factory=dict)
    """Arguments of the loss, as scale=30; of a data set's own, as sts='{scale: 30}'."""
    matryoshka_dims: Ints = ()
    """Train embeddings that can be cut to these dimensions."""
    prompts: Pairs = field(default_factory=dict)
    """Text before each column's texts, as anchor="query: "."""
    batch_sampler: Literal["batch_sampler", "no_duplicates", "group_by_label"] = "batch_sampler"
    """How batches are drawn; no_duplicates keeps equal texts apart."""
    token_cache: Switch = True
    """Texts are tokenised once, for all epochs and later runs, unless --no-token-cache."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured before, while and after training, and which model is kept."""

    eval_columns: Pairs = field(default_factory=dict)
    """Roles of the evaluation data's columns, where they differ from --columns; of one of several: NAME.ask=anchor."""
    eval_split: MaybeText = None
    """Split of the evaluation data: BEIR folder (test) or Hub (train)."""
    eval_tasks: Pairs = field(default_factory=dict)
    """What to measure on labelled texts: topics=clustering or topics=classification."""
    eval_train_data: Pairs = field(default_factory=dict)
    """Labelled texts that the probe of a classification learns from, as topics=FILE."""
    eval_k: MaybeInt = None
    """Depth of the retrieval metrics; without, 10."""
    eval_steps: MaybeInt = None
    """Evaluate after every N steps of training."""
    early_stopping_patience: MaybeInt = None
    """Stop after N evaluations without gain, and keep the best model."""
    forgetting_check: Switch = True
    """With --eval-data, measure on prose, too: what the model knew should not get worse."""


@dataclass(frozen=True)
class ModelOptions:
    """The model, its adapters, and the form in which its weights are held."""

    pooling_mode: MaybeText = None
    """Pooling, such as mean or cls; without, the model's own."""
    dtype: MaybeText = None
    """Of the base weights: float32, bfloat16, float16; without, by hardware."""
    load_in_8bit: Switch = False
    """Hold the base weights in 8 bits."""
    lora_dropout: Float = 0.0
    """Dropout before the adapters."""
    lora_targets: Texts = ()
    """Linear layers to adapt; without, those of the architecture."""
    lora_args: Values = field(default_factory=dict)
    """More arguments of get_peft_model, as use_rslora=true."""
    model_args: Values = field(default_factory=dict)
    """More arguments of from_pretrained, as revision=main."""


@dataclass(frozen=True)
class RunOptions:
    """The learning rate's course, speed and memory, checkpoints, trackers."""

    warmup: Float = 0.1
    """Steps until the learning rate's peak; below 1, their share of all steps."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "linear"
    """Course of the learning rate after the warm-up."""
    engine: Literal["auto", "packed", "reference"] = "auto"
    """How training runs; auto is the fastest that is proven for the model."""
    compile: Literal["auto", "never", "always"] = "auto"
    """Compile the layers; auto does where the run is long enough to pay."""
    gradient_checkpointing: Literal["none", "selective", "whole"] = "none"
    """Recompute in the backward pass what is cheap, or whole layers: less memory, slower."""
    save_steps: MaybeInt = None
    """Save a checkpoint every N steps; without, after every epoch."""
    report_to: Texts = ()
    """Trackers, as the Hugging Face Trainer names them (tensorboard, wandb …)."""
    training_args: Values = field(default_factory=dict)
    """More arguments of the Hugging Face Trainer, as weight_decay=0.01."""


SECTIONS: Mapping[str, type] = {
    "data": DataOptions,
    "evaluation": EvaluationOptions,
    "model": ModelOptions,
    "run": RunOptions,
}
"""The parts of `TrainDetails`, by the names that `--help-more` takes."""


@dataclass(frozen=True)
class TrainDetails(RunOptions, ModelOptions, EvaluationOptions, DataOptions):
    """All less common options; they are flags and keys of --config like the others."""
