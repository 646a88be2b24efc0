"""Pictures: training curves, aligned views, segmentations over their scans.

Volumes are arrays in RAS order. Views are shown as such, x to the right and y (anterior) up; segmented scans as
radiologists see them, the patient's right on the left.
"""
