"""Measuring a model on windows of text.

::

    passes       forward passes -> logits
    tokens       logits -> scores of every token          reference    what a search compares every trial with
    scoring      windows -> scores of tokens or windows
    warnings     caveats of an evaluation
    intervals    scores -> means with intervals           positions    scores -> means by position in the context
    report       all of it: ``evaluate``            texts        one piece of text, token by token
    generation   prompts -> continuations           behaviour    how they repeat, end, and how long they are
"""

from lowrank_core.evaluation.positions import PositionRow
from lowrank_core.evaluation.reference import DenseReference
from lowrank_core.evaluation.report import EvaluationReport, evaluate
from lowrank_core.evaluation.scoring import WindowScores, score_windows

__all__ = ["DenseReference", "EvaluationReport", "PositionRow", "WindowScores", "evaluate", "score_windows"]
