import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_expit, log_softmax

from pgl_ext.evaluation.probes.classifiers import LabelledFeatures, LinearClassifier, NearestNeighbours
from pgl_ext.evaluation.probes.features import features_at

N, F = 120, 6


def labelled(multi_label: bool, channels: int = 3, seed: int = 0) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N, F, generator=generator)
    scores = features[:, :channels] * 2 + torch.randn(N, channels, generator=generator)
    if multi_label:
        targets = (scores > 0.3).float()
        # The last channel is not known in the first third.
        weights = torch.rand(N, 1, generator=generator).repeat(1, channels)
        weights[: N // 3, -1] = 0
    else:
        targets = torch.nn.functional.one_hot(scores.argmax(1), channels).float()
        weights = torch.rand(N, 1, generator=generator).expand(N, channels)
    return LabelledFeatures(features, targets, weights, multi_label)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_logistic_regression_minimises_its_objective(multi_label, strength):
    data = labelled(multi_label)
    x, t, w = (value.double().numpy() for value in (data.features, data.targets, data.weights))

    def objective(parameters: np.ndarray) -> float:
        parameters = parameters.reshape(F + 1, 3)
        z = x @ parameters[:-1] + parameters[-1]
        if multi_label:
            losses = -(t * log_expit(z) + (1 - t) * log_expit(-z))
            loss = ((w * losses).sum(0) / w.sum(0)).sum()
        else:
            loss = (w[:, 0] * -(t * log_softmax(z, axis=1)).sum(1)).sum() / w[:, 0].sum()
        return loss + strength / 2 * (parameters[:-1] ** 2).sum()

    found = LinearClassifier(data, strength)
    best = minimize(objective, np.zeros((F + 1) * 3))
    parameters = torch.cat([found.weight, found.bias[None]]).double().numpy()
    assert objective(parameters.ravel()) <= best.fun + 1e-6
    np.testing.assert_allclose(found.weight, best.x.reshape(F + 1, 3)[:-1], atol=5e-3)


def test_an_organ_that_is_known_nowhere_is_not_learned():
    data = labelled(multi_label=True)
    weights = data.weights.clone()
    weights[:, 1] = 0
    found = LinearClassifier(LabelledFeatures(data.features, data.targets, weights, True), 0.1)
    assert torch.equal(found.weight[:, 1], torch.zeros(F))
    assert bool((found.weight[:, [0, 2]] != 0).any(0).all())


def by_hand(data: LabelledFeatures, queries: torch.Tensor, k: int) -> np.ndarray:
    """Shares of the votes, one query after another."""
    x, t, w = (value.double().numpy() for value in (data.features, data.targets, data.weights))
    shares = []
    for query in queries.double().numpy():
        cosine = x @ query / (np.linalg.norm(x, axis=1) * np.linalg.norm(query))
        nearest = np.argsort(-cosine)[:k]
        votes = np.exp(cosine[nearest] / 0.07)[:, None] * w[nearest]
        shares.append((votes * t[nearest]).sum(0) / votes.sum(0))
    return np.clip(shares, 1e-6, 1 - 1e-6)


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_the_nearest_neighbours_vote_as_by_hand(k):
    data, queries = labelled(multi_label=False), torch.randn(30, F, generator=torch.Generator().manual_seed(1))
    expected = by_hand(data, queries, k)
    np.testing.assert_allclose(NearestNeighbours(data, k).logits(queries), np.log(expected), atol=1e-3)


def test_votes_on_organs_are_odds_of_those_voxels_where_they_are_known():
    data, queries = labelled(multi_label=True), torch.randn(30, F, generator=torch.Generator().manual_seed(1))
    expected = by_hand(data, queries, 50)
    np.testing.assert_allclose(
        NearestNeighbours(data, 50).logits(queries), np.log(expected / (1 - expected)), atol=2e-3
    )


def test_the_length_of_features_does_not_matter_to_neighbours():
    data, queries = labelled(multi_label=False), torch.randn(30, F, generator=torch.Generator().manual_seed(1))
    probe = NearestNeighbours(data, 5)
    torch.testing.assert_close(probe.logits(queries * 9), probe.logits(queries))


# --- whole volumes --------------------------------------------------------------------------------------------------

SIZE, STRIDES = (13, 12, 7), [(2, 2, 1), (4, 4, 2)]


def maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 4, 7, 6, 7, generator=generator), torch.randn(1, 2, 4, 3, 4, generator=generator)]


def test_logits_interpolated_are_logits_of_interpolated_features():
    classifier = LinearClassifier(labelled(multi_label=False), 0.1)
    voxels = torch.cartesian_prod(*map(torch.arange, SIZE))
    expected = classifier.logits(features_at(maps(), STRIDES, voxels))
    whole = classifier.logits_of_volume(maps(), STRIDES, SIZE)
    assert whole.shape == (1, 3, *SIZE)
    torch.testing.assert_close(whole[0].flatten(1).T, expected, atol=1e-5, rtol=1e-5)


def test_neighbours_vote_at_the_places_of_the_finest_map():
    classifier = NearestNeighbours(labelled(multi_label=False), 5)
    places = torch.cartesian_prod(*(torch.arange(0, n, s) for n, s in zip(SIZE, STRIDES[0], strict=True)))
    expected = classifier.logits(features_at(maps(), STRIDES, places))
    whole = classifier.logits_of_volume(maps(), STRIDES, SIZE)
    assert whole.shape == (1, 3, *SIZE)
    torch.testing.assert_close(whole[:, :, ::2, ::2].flatten(2)[0].T, expected, atol=1e-4, rtol=1e-4)
