"""The model card: how a model was trained and what that changed, told through sentence-transformers' own card.

sentence-transformers writes a README.md from `model.model_card_data` whenever it saves a model, and its trainer fills
in data, losses and logs. What it cannot know (adapter, dtype, engine, the comparison with the untrained model) is put
into the same object here, so every later save carries it and nothing has to be written beside the card.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sentence_transformers import SentenceTransformer

from embtune.errors import ArgumentError
from embtune.evaluate.compare import Comparison

LIBRARY_TAG = "embtune"
_NO_ID = "sentence_transformers_model_id"  # stands in sentence-transformers' card where a model is not on the Hub


@dataclass(frozen=True)
class MetricChange:
    """A metric before and after training, on the same items."""

    before: float
    """Value of the untrained model."""
    after: float
    """Value of the trained model."""
    low: float | None = None
    """Lower end of the 95 % confidence interval of `after - before`; None where none was computed."""
    high: float | None = None
    """Upper end of that interval."""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ArgumentError("MetricChange needs both low and high, or neither.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ArgumentError(f"MetricChange: low={self.low} is above high={self.high}.")

    def __str__(self) -> str:
        change = f"{self.after - self.before:+.4f}"
        interval = "" if self.low is None else f", 95% interval {self.low:+.4f} to {self.high:+.4f}"
        # The value comes first: sentence-transformers reads it as the number for the card's metadata.
        return f"{self.after:.4f} (before: {self.before:.4f}, change {change}{interval})"


def metric_changes(comparison: Comparison) -> dict[str, MetricChange]:
    """The metrics of a comparison as the card lists them."""
    return {
        metric: MetricChange(change.before, change.after, change.low, change.high)
        for metric, change in comparison.metrics.items()
    }


@dataclass(frozen=True)
class DataFacts:
    """A data set as the card names it."""

    name: str
    """Its name; for a file, the file's name without folders."""
    rows: int
    """Number of rows used."""
    columns: Sequence[str]
    """Names of the columns, in the order of their roles."""
    hub_id: str | None = None
    """Its id on the Hub, if it is there."""

    def as_entry(self, loss: str) -> dict[str, object]:
        """The entry of `train_datasets` that sentence-transformers' template renders."""
        entry = {
            "name": self.name,
            "size": self.rows,
            "columns": [f"<code>{column}</code>" for column in self.columns],
            "loss": {"fullname": loss},
        }
        return {**entry, "id": self.hub_id} if self.hub_id else entry


class PairedComparison:
    """Stands in `eval_results_dict` for the evaluator of a comparison; the card prints its description and name."""

    description = "Before and after fine-tuning"
    primary_metric = None

    def __init__(self, name: str) -> None:
        self.name = name


def describe_training(
    model: SentenceTransformer,
    *,
    settings: Mapping[str, object],
    metrics: Mapping[str, Mapping[str, MetricChange]] | None = None,
    base_model: str | None = None,
    data: Sequence[DataFacts] = (),
    library_tag: bool = True,
) -> None:
    """Fill the model's card; call it after training, because the trainer's own notes replace it when it starts.

    Args:
        model: the trained model; every later `save_pretrained` writes the card.
        settings: name -> value, as the card lists them: LoRA rank, alpha and targets, loss, steps, batch, learning
            rate, dtype, engine … They stand before the arguments that the trainer noted itself.
        metrics: name of the evaluation data -> name of the metric -> before and after. They replace those of an
            earlier call.
        base_model: what the model was trained from: a Hub id, which becomes metadata and a link, or a local folder,
            of which only the last part is named. None keeps what sentence-transformers found out.
        data: the training data. Where the trainer noted as many data sets, only names and ids are taken from here.
        library_tag: whether the tag `embtune` is set.

    Raises:
        ArgumentError: `base_model` is neither a folder nor a Hub id.
    """
    local_base = base_model is not None and Path(base_model).is_dir()
    if base_model is not None and not local_base:
        _check_hub_id(base_model)
    card = model.model_card_data
    # Without this tag sentence-transformers writes the base model's old card again.
    card.add_tags("generated_from_trainer")
    card.tags = [tag for tag in card.tags if tag != LIBRARY_TAG] + ([LIBRARY_TAG] if library_tag else [])
    listed = {name: _one_line(value) for name, value in settings.items()}
    if local_base:
        listed = {"base_model": Path(str(base_model)).resolve().name, **listed}
        card.base_model = card.base_model_revision = None
        # Else sentence-transformers asks the Hub for repositories named like parts of the local path.
        card.local_files_only = True
    elif base_model is not None:
        card.base_model = base_model
    noted = {name: value for name, value in card.non_default_hyperparameters.items() if name not in listed}
    card.non_default_hyperparameters = {**listed, **noted}
    # The template shows neither list while this one is empty.
    card.all_hyperparameters = {**card.all_hyperparameters, **listed}
    card.train_datasets = _merged_data(card.train_datasets, data, listed.get("loss", "not noted"))
    kept = {key: found for key, found in card.eval_results_dict.items() if not isinstance(key, PairedComparison)}
    compared = {
        PairedComparison(name): {metric: str(change) for metric, change in changes.items()}
        for name, changes in (metrics or {}).items()
    }
    card.eval_results_dict = {**compared, **kept}


def add_section(folder: str | Path, title: str, text: str) -> None:
    """Put a section before "Training Details" of `folder`/README.md, or at its end."""
    path = Path(folder) / "README.md"
    card = path.read_text(encoding="utf-8")
    section = f"## {title}\n\n{text.strip()}\n\n"
    head, mark, tail = card.partition("\n## Training Details\n")
    path.write_text(f"{head.rstrip()}\n\n{section}{mark.lstrip()}{tail}".rstrip() + "\n", encoding="utf-8")


def settle_card(folder: str | Path, name: str, classes: Mapping[type, type]) -> None:
    """Let the code and the classes in `folder`/README.md be right where the folder is not on the Hub; or do nothing.

    Args:
        name: what the folder will be called.
        classes: class of this process -> the class of plain libraries that readers of the folder get.
    """
    path = Path(folder) / "README.md"
    if not path.exists():
        return
    card = path.read_text(encoding="utf-8")
    for ours, plain in classes.items():
        card = re.sub(rf"^(# |[( 0-9):]*){ours.__name__}(?=\(|$)", rf"\g<1>{plain.__name__}", card, flags=re.MULTILINE)
        card = card.replace(f"'architecture': '{ours.__name__}'", f"'architecture': '{plain.__name__}'")
    if _NO_ID in card:
        card = card.replace(f'"{_NO_ID}"', f'"{name}"')
        card = card.replace("# Download from the 🤗 Hub", "# Load it from its folder")
    path.write_text(card, encoding="utf-8")


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ArgumentError(f"base_model={name!r} is neither a folder nor an id on the Hub: {error}") from error


def _merged_data(noted: list[dict], data: Sequence[DataFacts], loss: str) -> list[dict]:
    if not data:
        return noted
    if len(noted) != len(data):
        return [facts.as_entry(loss) for facts in data]
    return [{**facts.as_entry(loss), **entry, **_named(facts)} for facts, entry in zip(data, noted, strict=True)]


def _named(facts: DataFacts) -> dict[str, str]:
    return {"name": facts.name, **({"id": facts.hub_id} if facts.hub_id else {})}


def _one_line(value: object) -> str:
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        items = sorted(map(str, value)) if isinstance(value, set | frozenset) else map(str, value)
        value = ", ".join(items)
    return " ".join(str(value).split())
