"""Evaluations in the form in which a Trainer calls them while it trains."""

from collections.abc import Callable, Mapping

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from embtune.errors import ArgumentError
from embtune.evaluate.result import EvaluationResult

Evaluation = Callable[[SentenceTransformer], EvaluationResult]
"""Measures a model, as `partial(evaluate_clustering, texts=texts, labels=labels)` does."""


class HeldOutEvaluator(SentenceEvaluator):
    """Any of embtune's evaluations as an evaluator of sentence-transformers' Trainer.

    With several evaluations each metric begins with the name of its own: `topics_accuracy`. The Trainer puts `eval_`
    before that, so `load_best_model_at_end` goes by `metric_for_best_model="eval_topics_accuracy"`.

    Args:
        evaluations: name -> evaluation.
        primary_metric: the metric that tells the best model, as the Trainer's `metric_for_best_model` without `eval_`.

    Raises:
        ArgumentError: there is no evaluation, or when it is called, no such metric.
    """

    def __init__(self, evaluations: Mapping[str, Evaluation], primary_metric: str) -> None:
        super().__init__()
        if not evaluations:
            raise ArgumentError("evaluations names none; give one at least.")
        self._evaluations = dict(evaluations)
        self.primary_metric = primary_metric

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,  # noqa: ARG002 (the Trainer gives it by name)
        epoch: float = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, evaluation in self._evaluations.items():
            result = evaluation(model)
            self.seen(result, steps)
            prefix = f"{name}_" if len(self._evaluations) > 1 else ""
            metrics |= {f"{prefix}{metric}": value for metric, value in result.metrics.items()}
        if self.primary_metric not in metrics:
            raise ArgumentError(f"primary_metric={self.primary_metric!r} is not among {', '.join(metrics)}.")
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def seen(self, result: EvaluationResult, steps: int) -> None:
        """Called with each result, after `steps` steps; for subclasses that show it."""
