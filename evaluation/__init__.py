"""Measure what a bundle's texts are worth, beside the dense model and the controls, at the bytes that each reads."""

from .evaluating import EvaluationConfig, evaluate
from .scores import Evaluation, Row, Score

__all__ = ["Evaluation", "EvaluationConfig", "Row", "Score", "evaluate"]
