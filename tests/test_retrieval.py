import pytest
import torch

from pgl_ext.aligner import PriorGuidedAligner
from pgl_ext.retrieval import correspondence_retrieval

VIEW_SIZE = (32, 32, 16)


def coordinate_features(affines: torch.Tensor, stride: int = 2) -> torch.Tensor:
    """(B, V, 4, x, y, z): the source coordinates of each feature's view voxel, centred, and a constant.

    Adding the constant makes the direction of the vector tell the place, also along a ray from the centre.
    """
    grid = torch.meshgrid(*(torch.arange(0, p, stride, dtype=torch.float32) for p in VIEW_SIZE), indexing="ij")
    voxels = torch.stack([*grid, torch.ones_like(grid[0])])
    source = torch.einsum("bvij,jxyz->bvixyz", affines, voxels)
    source[:, :, :3] -= torch.tensor([25.0, 25, 13])[:, None, None, None]
    source[:, :, 3] = 20
    return source


def test_identity_views_of_distinct_features_are_all_found():
    affines = torch.eye(4).expand(3, 2, 4, 4)
    features = torch.randn(3, 1, 32, 4, 4, 2, generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1, -1, -1, -1)
    assert correspondence_retrieval(features, affines, VIEW_SIZE).tolist() == [1.0, 1.0, 1.0]


def test_features_that_tell_the_place_are_found_across_crops_and_flips(make_batch):
    affines = make_batch(8, seed=1, min_overlap=0.3)["affines"]
    assert (affines.diagonal(dim1=2, dim2=3) < 0).any()
    aligner = PriorGuidedAligner((4, 4, 3))
    accuracy = correspondence_retrieval(coordinate_features(affines), affines, VIEW_SIZE, aligner)
    assert accuracy.shape == (8,)
    assert float(accuracy.mean()) > 0.97
    # The same features with the flips forgotten: what the aligner is for.
    scale = affines.diagonal(dim1=2, dim2=3)[..., :3]
    unflipped = affines.clone()
    unflipped[..., :3, 3] += scale.clamp(max=0) * (torch.tensor(VIEW_SIZE) - 1)
    unflipped.diagonal(dim1=2, dim2=3)[..., :3] = scale.abs()
    lost = correspondence_retrieval(coordinate_features(affines), unflipped, VIEW_SIZE, aligner)
    assert float(lost.mean()) < 0.5


@pytest.mark.parametrize("cells", [(2, 2, 2), (4, 4, 2)])
def test_random_features_are_found_by_chance(make_batch, cells):
    affines = make_batch(8, flip_prob=0.5)["affines"].repeat(50, 1, 1, 1)
    features = torch.randn(400, 2, 16, *cells, generator=torch.Generator().manual_seed(0))
    chance = 1 / (cells[0] * cells[1] * cells[2])
    accuracy = float(correspondence_retrieval(features, affines, VIEW_SIZE).mean())
    assert accuracy == pytest.approx(chance, abs=4 * (chance / 400 / 2) ** 0.5)


def test_the_length_of_features_does_not_matter(make_batch):
    affines = make_batch(2)["affines"]
    features = torch.randn(2, 2, 8, 4, 4, 2, generator=torch.Generator().manual_seed(0))
    scaled = features.clone()
    scaled[:, 1] *= 9
    plain, longer = (correspondence_retrieval(f, affines, VIEW_SIZE) for f in (features, scaled))
    assert torch.equal(plain, longer)


def test_half_precision_features_are_accepted(make_batch):
    affines = make_batch(2)["affines"]
    assert torch.isfinite(correspondence_retrieval(coordinate_features(affines).bfloat16(), affines, VIEW_SIZE)).all()


def test_cells_of_the_first_view_are_looked_up_in_the_second():
    """Both of the first view's are most like the first of the second view; the other way round, each finds its own."""
    first = torch.tensor([[1.0, 0], [0.5, 0.5]]).T
    second = torch.eye(2)
    affines = torch.eye(4).expand(1, 2, 4, 4)
    for views, expected in (((first, second), 0.5), ((second, first), 1.0)):
        features = torch.stack(views)[None, ..., None, None]
        assert correspondence_retrieval(features, affines, (4, 2, 2)).tolist() == [expected]
