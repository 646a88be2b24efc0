"""Pictures: training curves, aligned views, segmentations, scores, methods compared, a point of one scan in others.

Volumes are shown as arrays in RAS order: x to the right, y (anterior) or z (superior) up.
"""

from pgl_ext.figures.base import figure_to_array
from pgl_ext.figures.curves import plot_metrics
from pgl_ext.figures.overlays import plot_overlay
from pgl_ext.evaluation.figures import plot_differences, plot_scores
from pgl_ext.figures.similarity import plot_similarity
from pgl_ext.tools.study.figures import method_colors, plot_bars, plot_gains
from pgl_ext.figures.views import plot_views, source_to_view

__all__ = [
    "figure_to_array",
    "method_colors",
    "plot_bars",
    "plot_differences",
    "plot_gains",
    "plot_metrics",
    "plot_overlay",
    "plot_scores",
    "plot_similarity",
    "plot_views",
    "source_to_view",
]
