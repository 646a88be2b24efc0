"""Linear probes: how much of a labelled task the features of a frozen encoder hold, in minutes."""

from pgl_ext.evaluation.probes.network import ProbeNetwork, fit_probe

__all__ = ["ProbeNetwork", "fit_probe"]
