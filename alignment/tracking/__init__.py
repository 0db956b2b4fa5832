"""Metrics, settings and lineage of a stage in Weights & Biases, beside the metrics.jsonl in its folder."""

from alignment.tracking.run import Tracker

__all__ = ["Tracker"]
