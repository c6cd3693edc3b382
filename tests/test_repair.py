"""The closed-form repairs by hand."""

import math

import pytest
import torch

from prunus.errors import BadData
from prunus.repair import LeastSquares, head_residuals, norm_scale


def test_norm_scale_by_hand():
    energy, kept = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 1])
    assert norm_scale(energy, kept) == pytest.approx(math.sqrt(4 / 2 * 2 / 3))
    assert norm_scale(energy, torch.arange(4)) == 1.0


def test_norm_scale_makes_a_sliced_norm_exact_where_the_dropped_channels_are_silent():
    x = torch.randn(100, 8)
    x[:, 5:] = 0
    kept = torch.arange(5)

    def rms_norm(values):
        return values / values.square().mean(-1, keepdim=True).sqrt()

    scale = norm_scale(rms_norm(x).square().sum(0), kept)
    torch.testing.assert_close(rms_norm(x[:, :5]) * scale, rms_norm(x)[:, :5])


@pytest.mark.parametrize("energy", [torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0])])
def test_norm_scale_refuses_energy_that_says_nothing(energy):
    with pytest.raises(ValueError, match="energy"):
        norm_scale(energy, torch.tensor([0]))


def test_least_squares_finds_the_map_and_keeps_the_start_where_the_text_is_silent():
    x, truth = torch.randn(400, 5), torch.randn(3, 5)
    start = torch.randn(3, 5)
    found = LeastSquares(x.T @ x, damping=1e-9)(truth @ x.T @ x, start)
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)
    x[:, 4] = 0
    found = LeastSquares(x.T @ x, damping=1e-6)(truth @ x.T @ x, start)
    torch.testing.assert_close(found[:, 4], start[:, 4])
    torch.testing.assert_close(found[:, :4], truth[:, :4], rtol=1e-3, atol=1e-3)


def test_least_squares_keeps_the_start_of_a_dead_layer():
    start = torch.randn(3, 5)
    torch.testing.assert_close(LeastSquares(torch.zeros(5, 5))(torch.zeros(3, 5), start), start)


def test_least_squares_refuses_a_broken_gram_matrix():
    with pytest.raises(BadData, match="no solution with a damping"):
        LeastSquares(-torch.eye(3))


def test_head_residuals_by_hand():
    """Four heads ranked 2, 0, 3, 1, of which three stay: rank 3 (head 3) takes in rank 4 (head 1)."""
    heads = torch.arange(4.0)[:, None]
    folded = head_residuals(heads, [2, 0, 3, 1], 3)
    assert folded.flatten().tolist() == [0.0, 1.0, 2.0, 2 * 3.0 - 1.0]
