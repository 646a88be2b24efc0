"""Pictures: training curves, aligned views, segmentations over their scans.

Volumes are shown as arrays in RAS order: x to the right, y (anterior) or z (superior) up.
"""
