"""Digests by the Triton kernel are those of the reference, wherever tensors lie."""

import torch

from ddim_fast.kernels.digest import digest, memory, pieces, reference


def test_the_kernel_gives_the_reference_s_digests(device):
    tensors = [
        torch.randn(5, device=device),
        torch.randn(70001, device=device),
        torch.randn(131073, device=device).bfloat16(),
        torch.randn(101, device=device).half()[1:],
        torch.randn(3, 4, device=device).T,
        torch.randn(6, 6, device=device)[:, 2],
        torch.empty(0, device=device),
    ]
    memories = [memory(tensor) for tensor in tensors]
    found = digest(torch.tensor(pieces(memories), device=device))
    assert found.tolist() == reference([whole.cpu() for whole in memories])


def test_a_changed_word_changes_its_piece_alone(device):
    tensor = torch.randn(200_000, device=device)
    table = torch.tensor(pieces([memory(tensor)]), device=device)
    before = digest(table)
    tensor[70_000] *= -1
    assert (digest(table) != before).tolist() == [False, True, False, False]
