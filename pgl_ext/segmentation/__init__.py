"""Fine-tuning a segmentation network, and segmenting new scans with it."""
