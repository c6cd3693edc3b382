"""Formulas of weight dimensions, against reshaping by hand."""

import pytest
import torch

from prunus import dims

SIZES = {"hidden": 10, "ffn": 5, "heads": 6, "kv_heads": 3, "head_dim": 4}
KEPT = {"ffn": [0, 3, 4], "heads": [1, 5], "kv_heads": [0, 2]}


def chosen(axis: str) -> torch.Tensor | None:
    return torch.tensor(KEPT[axis]) if axis in KEPT else None


def places(*parts: torch.Tensor) -> list[int]:
    return torch.cat([part.flatten() for part in parts]).tolist()


heads = torch.arange(24).view(6, 4)
keys = torch.arange(12).view(3, 4)
by_group = torch.arange(48).view(3, 4, 4)  # two queries, key, value
BY_HAND = {
    "ffn": KEPT["ffn"],
    "2*ffn": places(torch.arange(10).view(2, 5)[:, KEPT["ffn"]]),
    "ffn + ffn": places(torch.arange(10).view(2, 5)[:, KEPT["ffn"]]),
    "ffn*2": places(torch.arange(10).view(5, 2)[KEPT["ffn"]]),
    "heads*head_dim": places(heads[KEPT["heads"]]),
    "heads*3*head_dim": places(torch.arange(72).view(6, 12)[KEPT["heads"]]),
    "heads*head_dim + 2*kv_heads*head_dim": places(
        heads[KEPT["heads"]], 24 + keys[KEPT["kv_heads"]], 36 + keys[KEPT["kv_heads"]]
    ),
    "kv_heads*(group + 2)*head_dim": places(by_group[0, [1, 2, 3]], by_group[2, [1, 2, 3]]),
}


@pytest.mark.parametrize("formula", BY_HAND)
def test_kept_places_are_those_by_hand(formula: str) -> None:
    index = dims.index(formula, SIZES, chosen)
    assert index is not None
    assert index.tolist() == BY_HAND[formula]


@pytest.mark.parametrize("formula", [*BY_HAND, "hidden"])
def test_the_size_after_a_cut_is_the_number_of_kept_places(formula: str) -> None:
    cut = SIZES | {axis: len(kept) for axis, kept in KEPT.items()}
    index = dims.index(formula, SIZES, chosen)
    assert dims.size(formula, cut) == (SIZES["hidden"] if index is None else len(index))


@pytest.mark.parametrize("formula", BY_HAND)
def test_an_element_owns_the_places_that_leave_with_it(formula: str) -> None:
    for axis in dims.names(formula) & {"ffn", "heads"}:
        owner = dims.owner(formula, SIZES, axis)
        for element in range(SIZES[axis]):
            others = torch.tensor([other for other in range(SIZES[axis]) if other != element])
            stay = dims.index(formula, SIZES, {axis: others}.get)
            assert stay is not None
            assert stay.tolist() == (owner != element).nonzero().flatten().tolist()


def test_all_stay_where_no_axis_is_cut() -> None:
    assert dims.index("hidden", SIZES, chosen) is None
    assert dims.index("2*head_dim", SIZES, chosen) is None


@pytest.mark.parametrize("formula", ["ffn - 1", "ffn/2", "max(ffn, 1)"])
def test_only_sums_and_products(formula: str) -> None:
    with pytest.raises(ValueError, match="sums and products"):
        dims.size(formula, SIZES)
