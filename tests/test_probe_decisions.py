import numpy as np
import pytest
import torch
from scipy.special import logit, softmax

from pgl_ext.evaluation.probes.decisions import decide, organ_log_odds
from pgl_ext.evaluation.probes.selection import average_precision
from pgl_ext.task import SegmentationTask

ORGANS = SegmentationTask({"liver": [1], "spleen": [2]})
TUMOUR = SegmentationTask({"kidney": [1, 2], "tumour": [2]}, multi_label=True)
SHAPE = (6, 5, 4)


def random_logits(channels: int) -> torch.Tensor:
    return torch.randn(channels, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_log_odds_are_those_of_the_probabilities():
    logits = random_logits(3)
    expected = logit(softmax(logits.double().numpy(), axis=0))[1:]
    np.testing.assert_allclose(organ_log_odds(logits, ORGANS), expected, atol=1e-5)
    assert torch.equal(organ_log_odds(random_logits(2), TUMOUR), random_logits(2))


def test_certain_voxels_have_finite_log_odds():
    assert torch.isfinite(organ_log_odds(random_logits(3) * 1e4, ORGANS)).all()


@pytest.mark.parametrize("sizes", [(0, 0), (1, 30), (17, 120), (119, 5)])
def test_each_organ_gets_its_size(sizes):
    masks = TUMOUR.masks(decide(random_logits(2), TUMOUR, sizes))
    assert masks.flatten(1).sum(1).tolist() == list(sizes)
    # They are the voxels that score highest.
    for mask, scores in zip(masks, random_logits(2), strict=True):
        if 0 < mask.sum() < mask.numel():
            assert float(scores[mask].min()) > float(scores[~mask].max())


def test_organs_that_exclude_each_other_share_disputed_voxels():
    logits, sizes = random_logits(3), (40, 50)
    masks = ORGANS.masks(decide(logits, ORGANS, sizes))
    odds = organ_log_odds(logits, ORGANS)
    alone = torch.stack(
        [o >= o.flatten().sort(descending=True).values[n - 1] for o, n in zip(odds, sizes, strict=True)]
    )
    assert not bool(masks.all(0).any())
    assert torch.equal(masks.any(0), alone.any(0))
    disputed = alone.all(0)
    assert bool(disputed.any())
    assert torch.equal(masks[:, ~disputed], alone[:, ~disputed])


def test_a_shift_of_a_volumes_logits_changes_nothing():
    shift = torch.tensor([3.0, -5.0]).view(2, 1, 1, 1)
    plain, shifted = (TUMOUR.masks(decide(z, TUMOUR, (20, 7))) for z in (random_logits(2), random_logits(2) + shift))
    assert torch.equal(plain, shifted)


# --- average precision ----------------------------------------------------------------------------------------------


def test_average_precision_is_that_of_voxels_repeated():
    generator = np.random.default_rng(0)
    scores, positive, counts = generator.normal(size=60), generator.random(60) < 0.3, generator.integers(1, 5, 60)
    total = 0.0
    for score in scores[positive]:
        above = scores >= score
        weight = counts[(scores == score) & positive][0]
        total += weight * counts[above & positive].sum() / counts[above].sum()
    found = average_precision(*(torch.from_numpy(np.asarray(v, dtype=np.float64)) for v in (scores, positive, counts)))
    assert float(found) == pytest.approx(total / counts[positive].sum())


def test_average_precision_of_a_perfect_order_is_one_and_of_no_voxels_undefined():
    scores, counts = torch.arange(10.0), torch.rand(10)
    assert float(average_precision(scores, (scores > 6).float(), counts)) == pytest.approx(1)
    assert torch.isnan(average_precision(scores, torch.zeros(10), counts))
