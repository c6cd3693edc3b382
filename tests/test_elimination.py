"""What each neuron or head is worth, against least squares done anew for every one."""

import itertools

import pytest
import torch

from prunus.elimination import removal_errors

TOKENS, NEURONS, CHANNELS = 500, 6, 4


@pytest.fixture
def layer():
    """What the neurons say, correlated, and the projection that writes."""
    generator = torch.Generator().manual_seed(3)
    mixing_FF = torch.randn(NEURONS, NEURONS, generator=generator)
    h_NF = torch.randn(TOKENS, NEURONS, generator=generator) @ mixing_FF
    return h_NF, torch.randn(CHANNELS, NEURONS, generator=generator)


def error_without(h_NF, weight_OF, gone):
    """Mean squared error of what is written when these leave and the others are fitted."""
    h_NF, stay = h_NF.double(), [i for i in range(NEURONS) if i not in gone]
    written_NO = h_NF @ weight_OF.double().T
    refit = torch.linalg.lstsq(h_NF[:, stay], written_NO).solution
    return float((written_NO - h_NF[:, stay] @ refit).square().sum() / len(h_NF))


def test_each_time_the_least_missed_one_leaves(layer):
    h_NF, weight_OF = layer
    found = removal_errors(h_NF.double().T @ h_NF.double() / len(h_NF), weight_OF, rounds=NEURONS, damping=1e-9)
    gone: list[int] = []
    for neuron in found.argsort().tolist()[:-1]:
        left = [i for i in range(NEURONS) if i not in gone]
        best = min(left, key=lambda i: error_without(h_NF, weight_OF, [*gone, i]))
        assert neuron == best
        rise = error_without(h_NF, weight_OF, [*gone, neuron]) - error_without(h_NF, weight_OF, gone)
        assert float(found[neuron]) >= rise * (1 - 1e-2)
        gone.append(neuron)
    assert float(found.min()) == pytest.approx(error_without(h_NF, weight_OF, gone[:1]), rel=1e-2)


def test_columns_of_a_head_leave_together(layer):
    h_NF, weight_OF = layer
    found = removal_errors(h_NF.T @ h_NF / len(h_NF), weight_OF, columns=2, damping=1e-9)
    heads = [[0, 1], [2, 3], [4, 5]]
    alone = [error_without(h_NF, weight_OF, head) for head in heads]
    first, second, last = found.argsort().tolist()
    assert first == min(range(3), key=alone.__getitem__)
    assert float(found[first]) == pytest.approx(alone[first], rel=1e-2)
    both = {i: error_without(h_NF, weight_OF, heads[first] + heads[i]) for i in (second, last)}
    assert both[second] < both[last]


def test_it_leaves_less_error_than_scores_of_neurons_alone(layer):
    """Two neurons that say the same are each worth nothing alone; together they are not."""
    h_NF, weight_OF = layer
    h_NF[:, 1] = h_NF[:, 0] + 1e-3 * torch.randn(TOKENS, generator=torch.Generator().manual_seed(5))
    weight_OF[:, :2] *= 100
    order = removal_errors(h_NF.T @ h_NF / len(h_NF), weight_OF, rounds=NEURONS, damping=1e-9).argsort().tolist()
    assert len({0, 1} & set(order[:3])) == 1
    best = min(error_without(h_NF, weight_OF, gone) for gone in itertools.combinations(range(NEURONS), 3))
    assert error_without(h_NF, weight_OF, order[:3]) < 2 * best


def test_a_neuron_alone_costs_what_it_wrote(layer):
    _, weight_OF = layer
    found = removal_errors(torch.eye(NEURONS), weight_OF, rounds=1, damping=0)
    torch.testing.assert_close(found, weight_OF.square().sum(0))


def test_a_dead_layer_costs_nothing(layer):
    _, weight_OF = layer
    assert torch.equal(removal_errors(torch.zeros(NEURONS, NEURONS), weight_OF).round(decimals=6), torch.zeros(NEURONS))
