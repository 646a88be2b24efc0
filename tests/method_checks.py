"""What tests of several methods and losses compare with."""

from __future__ import annotations

import numpy as np
import torch


def target_parameters(method):
    return [*method.target_encoder.parameters(), *method.target_projector.parameters()]


def online_parameters(method):
    return [*method.encoder.parameters(), *method.projector.parameters(), *method.predictor.parameters()]


def swapped(batch):
    return {key: value.flip(1) for key, value in batch.items()}


def distance(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over samples and cells of 2 - 2 cos, in NumPy and double precision (equation 8)."""
    p, t = (np.moveaxis(x.detach().double().numpy(), 1, -1).reshape(-1, x.shape[1]) for x in (prediction, target))
    cosine = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
    return float((2 - 2 * cosine).mean())


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """SimCLR's equation 1, sample by sample, in NumPy and double precision."""
    z = np.concatenate([first.double().numpy(), second.double().numpy()])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    terms = []
    for i in range(len(z)):
        similar = np.exp(z @ z[i] / temperature)
        terms.append(-np.log(similar[(i + len(first)) % len(z)] / (similar.sum() - similar[i])))
    return float(np.mean(terms))
