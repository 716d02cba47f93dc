"""Proof: retrieval, similarity, clustering and classification, before and after."""

from embtune.evaluate.bootstrap import Difference, paired_bootstrap
from embtune.evaluate.classification import ClassificationResult, evaluate_classification
from embtune.evaluate.clustering import ClusteringResult, evaluate_clustering
from embtune.evaluate.compare import Comparison, ItemChange, compare
from embtune.evaluate.evaluator import HeldOutEvaluator
from embtune.evaluate.mteb_tasks import MtebScore, evaluate_mteb, mteb_tasks
from embtune.evaluate.retrieval import Hit, RetrievalResult, evaluate_retrieval
from embtune.evaluate.sts import StsResult, evaluate_sts

__all__ = [
    "ClassificationResult",
    "ClusteringResult",
    "Comparison",
    "Difference",
    "HeldOutEvaluator",
    "Hit",
    "ItemChange",
    "MtebScore",
    "RetrievalResult",
    "StsResult",
    "compare",
    "evaluate_classification",
    "evaluate_clustering",
    "evaluate_mteb",
    "evaluate_retrieval",
    "evaluate_sts",
    "mteb_tasks",
    "paired_bootstrap",
]
