"""Linear and nearest-neighbour probes: how much of a labelled task a frozen encoder's features hold, in minutes."""

from pgl_ext.evaluation.probes.network import ProbeNetwork, fit_probe

__all__ = ["ProbeNetwork", "fit_probe"]
