"""The training arguments: those of sentence-transformers, and what embtune adds."""

from dataclasses import dataclass, field

import sentence_transformers

from embtune.accelerate.breakeven import MODES
from embtune.errors import ArgumentError
from embtune.runtime import default_device


@dataclass
class SentenceTransformerTrainingArguments(sentence_transformers.SentenceTransformerTrainingArguments):
    """sentence-transformers' arguments with the same names and meaning, and six more.

    Where there is no accelerator, `dataloader_pin_memory` is off. One default differs: `logging_nan_inf_filter` is off.
    Switched on, it asks the accelerator in every step whether the loss is a number, which stops the host from preparing
    the next one, and hides from the log that it is not.

    Raises:
        ArgumentError: a value is unknown, or sentence-transformers would accept it and do nothing.
    """

    compile: str = field(
        default="auto",
        metadata={"help": 'Compile the encoder layers: "auto" where the run is long enough to pay, "never", "always".'},
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Roles of the data's columns by their names, such as {'question': 'anchor'}."},
    )
    cuda_graphs: str = field(
        default="auto",
        metadata={
            "help": 'Replay the packed encoder\'s forward and backward as CUDA graphs: "auto" on one NVIDIA GPU where '
            'nothing forbids it, "never", "always".'
        },
    )
    dataset_weights: dict[str, float] | None = field(
        default=None,
        metadata={"help": "How often an epoch goes through each of several data sets, by name; those not named: once."},
    )
    fused_kernels: str = field(
        default="auto",
        metadata={
            "help": "On the packed engine, compute adapted layers, norms, dropout, gates and rotary embeddings in few "
            'kernels: "never", "always", or "auto": always, but without those that Triton would first have to compile '
            "for longer than a short run gains."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are no numbers out of the log; waits for them in every step."},
    )
    token_cache: bool = field(
        default=True,
        metadata={
            "help": "Tokenise each text once instead of in every epoch, and keep the token ids for later runs; "
            "`embtune cache` shows and clears what is kept."
        },
    )

    def __post_init__(self) -> None:
        for name in ("compile", "cuda_graphs", "fused_kernels"):
            if getattr(self, name) not in MODES:
                raise ArgumentError(f"{name}={getattr(self, name)!r} is not known; use one of {', '.join(MODES)}.")
        if self.train_sampling_strategy == "group_by_length":
            raise ArgumentError(
                'train_sampling_strategy="group_by_length" does nothing in sentence-transformers, which builds its own '
                "batches; leave it out."
            )
        for name, weight in (self.dataset_weights or {}).items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ArgumentError(f"dataset_weights: {name}={weight!r} must be a number above 0.")
        if isinstance(self.gradient_checkpointing, str):
            raise ArgumentError(
                f"gradient_checkpointing={self.gradient_checkpointing!r} must be True or False here, and means whole "
                'layers; pass use_gradient_checkpointing="selective" to from_pretrained or get_peft_model.'
            )
        # Without an accelerator there is nothing to pin memory for, and PyTorch's loaders would warn of it.
        if default_device().type == "cpu":
            self.dataloader_pin_memory = False
            if self.bf16:
                self.use_cpu = True  # transformers takes bf16 for a GPU's unless it is told so
        super().__post_init__()
