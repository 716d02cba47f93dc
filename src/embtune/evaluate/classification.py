"""Classification: how much of the label can a linear probe read from the embedding?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from embtune.data.ranking import embed
from embtune.errors import DataError
from embtune.evaluate.bootstrap import Statistic, mean_statistic
from embtune.evaluate.inputs import as_labels, as_texts, fingerprint
from embtune.evaluate.result import EvaluationResult, ItemScores


@dataclass(frozen=True, eq=False)
class ClassificationResult(EvaluationResult):
    """Accuracy and macro F1 of the probe on the test texts."""

    kind: ClassVar[str] = "classification"

    texts: tuple[str, ...]
    """The test texts, in the order of the arrays."""
    labels: tuple[Any, ...]
    """Each test text's label."""
    predictions: tuple[Any, ...]
    """The label that the probe gives each test text."""

    @property
    def accuracy(self) -> float:
        """Share of test texts with the right prediction."""
        return self.metrics["accuracy"]

    @property
    def macro_f1(self) -> float:
        """F1 of each label, averaged over the labels."""
        return self.metrics["macro_f1"]

    @property
    def correct(self) -> np.ndarray:
        """Whether each test text's prediction is right (N,), bool."""
        pairs = zip(self.labels, self.predictions, strict=True)
        return np.array([label == prediction for label, prediction in pairs])

    def by_item(self) -> ItemScores:
        return ItemScores.of_rows("accuracy", self.correct.astype(np.float64), self.texts)

    def statistics(self) -> dict[str, Statistic]:
        return {
            "accuracy": mean_statistic(self.correct.astype(np.float64)),
            "macro_f1": _macro_f1_statistic(self.labels, self.predictions),
        }


def evaluate_classification(
    model: SentenceTransformer,
    train_texts: Iterable[str],
    train_labels: Iterable[Any],
    test_texts: Iterable[str],
    test_labels: Iterable[Any],
    *,
    seed: int = 0,
    batch_size: int = 64,
    show_progress: bool = False,
) -> ClassificationResult:
    """Fit a logistic regression on frozen embeddings of the training texts and apply it to the test texts.

    As in MTEB the embeddings are used as they are and the regression keeps scikit-learn's regularisation (C = 1);
    all training texts are used.

    Raises:
        DataError: lengths differ, fewer than two training labels, or a test label that no training text has.
    """
    texts_train, texts_test = as_texts("train_texts", train_texts), as_texts("test_texts", test_texts)
    labels_train = as_labels("train_labels", train_labels, "train_texts", texts_train)
    labels_test = as_labels("test_labels", test_labels, "test_texts", texts_test)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels_train))}
    if len(numbers) < 2:
        raise DataError(f"train_labels holds only {labels_train[0]!r}; a probe needs at least two different labels.")
    for row, label in enumerate(labels_test):
        if label not in numbers:
            raise DataError(
                f"test_labels[{row}] is {label!r}, which no training text has; the probe could never predict it."
            )
    train = embed(model.encode, texts_train, batch_size=batch_size, show_progress=show_progress).cpu().numpy()
    test = embed(model.encode, texts_test, batch_size=batch_size, show_progress=show_progress).cpu().numpy()
    probe = LogisticRegression(max_iter=1000, random_state=seed).fit(train, [numbers[label] for label in labels_train])
    known_labels = list(numbers)
    predicted = probe.predict(test)
    truth = [numbers[label] for label in labels_test]
    return ClassificationResult(
        metrics={
            "accuracy": float(np.mean(predicted == truth)),
            "macro_f1": float(f1_score(truth, predicted, average="macro")),
        },
        items=len(texts_test),
        fingerprint=fingerprint(texts_train, labels_train, texts_test, labels_test),
        texts=tuple(texts_test),
        labels=tuple(labels_test),
        predictions=tuple(known_labels[number] for number in predicted),
    )


def _macro_f1_statistic(labels: tuple[Any, ...], predictions: tuple[Any, ...]) -> Statistic:
    """Macro F1 within each draw, over the labels that occur in it as truth or as prediction."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys([*labels, *predictions]))}
    one_hot_CC = np.eye(len(numbers))
    truth_NC = one_hot_CC[[numbers[label] for label in labels]]
    predicted_NC = one_hot_CC[[numbers[label] for label in predictions]]

    def macro_f1(counts_SN: np.ndarray) -> np.ndarray:
        hits_SC = counts_SN @ (truth_NC * predicted_NC)
        occurrences_SC = counts_SN @ (truth_NC + predicted_NC)
        f1_SC = np.divide(2 * hits_SC, occurrences_SC, out=np.zeros_like(hits_SC), where=occurrences_SC > 0)
        return f1_SC.sum(axis=1) / (occurrences_SC > 0).sum(axis=1)

    return macro_f1
