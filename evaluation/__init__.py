"""Measure a bundle's quality against the dense model and the controls, at the bytes that each reads."""

from .evaluate import EvaluationConfig, evaluate
from .scores import Evaluation, MetricScore, Variant

__all__ = ["Evaluation", "EvaluationConfig", "Variant", "MetricScore", "evaluate"]
