"""The training arguments: those of sentence-transformers, and what embtune adds."""

from dataclasses import dataclass, field

import sentence_transformers

from embtune.accelerate.breakeven import COMPILE_MODES
from embtune.errors import ArgumentError


@dataclass
class SentenceTransformerTrainingArguments(sentence_transformers.SentenceTransformerTrainingArguments):
    """sentence-transformers' arguments with the same names, defaults and meaning, and two more.

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

    def __post_init__(self) -> None:
        if self.compile not in COMPILE_MODES:
            raise ArgumentError(f"compile={self.compile!r} is not known; use one of {', '.join(COMPILE_MODES)}.")
        if self.train_sampling_strategy == "group_by_length":
            raise ArgumentError(
                'train_sampling_strategy="group_by_length" does nothing in sentence-transformers, which builds its own '
                "batches; leave it out."
            )
        super().__post_init__()
