import pytest
import torch
from coreinfer.compiler.prune.triangle import num_packed, pack_upper, unpack_upper


@pytest.mark.parametrize("side", [1, 5, 63, 64, 65, 200])
def test_a_packed_matrix_is_unpacked_as_it_was_above_the_diagonal(side: int) -> None:
    matrix = torch.randn((side, side), generator=torch.Generator().manual_seed(side))
    packed = pack_upper(matrix)
    found = unpack_upper(packed, side)
    assert len(packed) == num_packed(side) <= side * (side + 64) / 2
    assert torch.equal(found, matrix.triu() + matrix.triu(1).T)
    # What is below the diagonal is of no use, and may be anything.
    assert torch.equal(unpack_upper(pack_upper(matrix.triu().fill_diagonal_(0) + matrix.diag().diag()), side), found)


def test_packed_matrices_are_added_as_the_matrices_themselves() -> None:
    first, second = (torch.randn((130, 130), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    both = unpack_upper(pack_upper(first) + pack_upper(second), 130)
    assert torch.equal(both, unpack_upper(pack_upper(first + second), 130))
