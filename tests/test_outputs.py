"""An output reads as an object, a tuple and a dict."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree as pytree

from ddim_fast.outputs import Output


@dataclass
class Pair(Output):
    first: torch.Tensor
    second: torch.Tensor | None = None


def test_fields_read_by_attribute_index_slice_and_key():
    x, y = torch.zeros(1), torch.ones(2)
    pair = Pair(x, y)
    assert pair.first is pair[0] is pair["first"] is x
    assert pair[-1] is y
    assert pair[:1] == (x,)
    assert pair.to_tuple() == (x, y)
    assert list(pair) == ["first", "second"]


def test_fields_without_a_value_are_left_out():
    pair = Pair(torch.zeros(1))
    assert len(pair) == 1 and len(pair.to_tuple()) == 1
    with pytest.raises(KeyError):
        pair["second"]
    with pytest.raises(IndexError):
        pair[1]


def test_assignment_reaches_every_view():
    pair = Pair(torch.zeros(1))
    pair.second = "by attribute"
    assert pair[1] == pair["second"] == "by attribute"
    pair["second"] = "by key"
    assert pair[1] == pair.second == "by key"
    pair.second = None
    assert len(pair) == 1


def test_fields_are_fixed():
    pair = Pair(torch.zeros(1))
    with pytest.raises(KeyError):
        pair["third"] = 1
    for change in (pair.clear, lambda: pair.pop("first"), lambda: pair.update(first=1)):
        with pytest.raises(TypeError):
            change()
    with pytest.raises(TypeError, match="third"):
        Pair({"first": 1, "third": 2})


def test_an_output_is_rebuilt_from_a_mapping_a_pickle_and_a_tree():
    pair = Pair(torch.zeros(1), torch.ones(2))
    assert Pair(dict(pair)).second is pair.second
    for twin in (pickle.loads(pickle.dumps(pair)), copy.deepcopy(pair)):
        assert isinstance(twin, Pair) and torch.equal(twin.second, pair.second)
    doubled = pytree.tree_map(lambda tensor: 2 * tensor, pair)
    assert isinstance(doubled, Pair) and doubled.second.tolist() == [2, 2]


def test_it_answers_as_diffusers_does():
    diffusers_outputs = pytest.importorskip("diffusers.utils").BaseOutput

    @dataclass
    class Theirs(diffusers_outputs):
        first: torch.Tensor
        second: torch.Tensor | None = None

    for arguments in ((1,), (1, 2), ({"first": 3},)):
        ours, theirs = Pair(*arguments), Theirs(*arguments)
        assert ours.to_tuple() == theirs.to_tuple()
        assert dict(ours) == dict(theirs)
        assert ours[0] == theirs[0] and ours[:] == theirs[:]
