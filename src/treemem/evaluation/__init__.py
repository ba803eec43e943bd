"""Measures retrieval and answers on evaluation sets."""

from treemem.evaluation.answers import evaluate_answers
from treemem.evaluation.dataset import EvalQuery, EvalSet, load_set
from treemem.evaluation.report import EvalReport, print_report
from treemem.evaluation.retrieval import DEFAULT_MODES, MODE_NAMES, evaluate
from treemem.evaluation.run import run

__all__ = [
    "DEFAULT_MODES",
    "MODE_NAMES",
    "EvalQuery",
    "EvalReport",
    "EvalSet",
    "evaluate",
    "evaluate_answers",
    "load_set",
    "print_report",
    "run",
]
