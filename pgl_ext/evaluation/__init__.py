"""Measuring segmentations and features: scores, their summaries and comparisons, probes, feature maps."""
