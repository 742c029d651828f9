"""Attention against dense masks and explicit rotations; the sparse cross-attentions in values and in gradients."""

import math

import pytest
import torch
from tiny import randomise
from torch import Tensor

from blt.model.attention import CrossAttention, DecoderCrossAttention, EncoderCrossAttention
from blt.model.rotary import rotary_rotation, rotate

WIDTH, NUM_HEADS, NUM_BYTES, NUM_PATCHES = 12, 3, 7, 5
CPU = torch.device("cpu")
# Row 0 has as many patches as the batch, row 1 a long one and two empty ones.
PATCH_IDS = torch.tensor([[0, 1, 2, 2, 3, 3, 4], [0, 1, 1, 1, 1, 2, 2]])


def flat_index(ids: Tensor, num_patches: int) -> Tensor:
    """Patch ids counted through all rows, each row with room for ``num_patches``."""
    return (ids + num_patches * torch.arange(len(ids))[:, None]).flatten()


NEWEST_CLOSED = torch.tensor([[0, 1, 1, 2, 2, 3, 4], [0, 0, 0, 0, 1, 1, 1]])


def dense_cross_attention(layer: CrossAttention, readers: Tensor, read: Tensor, allowed: Tensor) -> Tensor:
    """One row: every reader scores everything that is read, and a mask says what counts. ``[reader, width]``."""

    def normed(states: Tensor, weight: Tensor) -> Tensor:
        return states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    readers, read = normed(readers, layer.q_norm.weight), normed(read, layer.k_norm.weight)
    queries, keys = readers @ layer.q_proj.weight.T, read @ layer.k_proj.weight.T
    values = read @ layer.v_proj.weight.T
    mixed = []
    for head in range(layer.num_heads):
        part = slice(head * WIDTH // layer.num_heads, (head + 1) * WIDTH // layer.num_heads)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(WIDTH // layer.num_heads)
        mixed.append(scores.masked_fill(~allowed, -math.inf).softmax(1) @ values[:, part])
    return torch.cat(mixed, 1) @ layer.o_proj.weight.T


def gather(layer: EncoderCrossAttention, slots: Tensor, byte_states: Tensor) -> Tensor:
    """What the slots of ``PATCH_IDS`` read, ``[row, patch, slot, width]``."""
    read = layer(slots.flatten(0, 1), byte_states.flatten(0, 1), flat_index(PATCH_IDS, NUM_PATCHES))
    return read.unflatten(0, (2, NUM_PATCHES))


def random_states(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_close_with_gradients(layer: CrossAttention, actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(9))
    sources = [*inputs, *layer.parameters()]
    gradients = torch.autograd.grad((actual * direction).sum(), sources, retain_graph=True)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), sources)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("slots_per_patch", [1, 2, 4])
def test_slots_read_their_patch_as_under_a_dense_mask_and_so_do_gradients(slots_per_patch: int) -> None:
    layer = EncoderCrossAttention(WIDTH, NUM_HEADS, 1e-5)
    randomise(layer, seed=0)
    slots = random_states(2, NUM_PATCHES, slots_per_patch, WIDTH, seed=1)
    byte_states = random_states(2, NUM_BYTES, WIDTH, seed=2)
    read = gather(layer, slots, byte_states)
    patch_of_slot = torch.arange(NUM_PATCHES).repeat_interleave(slots_per_patch)
    rows, expected = [], []
    for row in range(2):
        filled = (int(PATCH_IDS[row].max()) + 1) * slots_per_patch
        allowed = patch_of_slot[:filled, None] == PATCH_IDS[row][None, :]
        rows.append(read[row].flatten(0, 1)[:filled])
        expected.append(dense_cross_attention(layer, slots[row].flatten(0, 1)[:filled], byte_states[row], allowed))
    assert_close_with_gradients(layer, torch.cat(rows), torch.cat(expected), [slots, byte_states])


@pytest.mark.parametrize("slots_per_patch", [1, 2, 4])
def test_bytes_add_to_twice_their_states_what_they_read_of_the_newest_closed_patch(slots_per_patch: int) -> None:
    layer = DecoderCrossAttention(WIDTH, NUM_HEADS, 1e-5)
    randomise(layer, seed=0)
    slots = random_states(2, NUM_PATCHES, slots_per_patch, WIDTH, seed=1)
    byte_states = random_states(2, NUM_BYTES, WIDTH, seed=2)
    keys, values = (part[flat_index(NEWEST_CLOSED, NUM_PATCHES)] for part in layer.keys_values(slots.flatten(0, 1)))
    read = layer.read_patches(byte_states, keys, values)
    patch_of_slot = torch.arange(NUM_PATCHES).repeat_interleave(slots_per_patch)
    expected = [
        2 * byte_states[row]
        + dense_cross_attention(
            layer, byte_states[row], slots[row].flatten(0, 1), NEWEST_CLOSED[row][:, None] == patch_of_slot[None, :]
        )
        for row in range(2)
    ]
    assert_close_with_gradients(layer, read, torch.stack(expected), [slots, byte_states])


def test_slots_of_empty_patches_read_nothing_and_give_no_gradient() -> None:
    layer = EncoderCrossAttention(WIDTH, NUM_HEADS, 1e-5)
    randomise(layer, seed=0)
    slots, byte_states = random_states(2, NUM_PATCHES, 2, WIDTH, seed=1), random_states(2, NUM_BYTES, WIDTH, seed=2)
    read = gather(layer, slots, byte_states)
    assert read[1, 3:].eq(0).all()
    (gradient,) = torch.autograd.grad(read.sum(), [slots])
    assert gradient.isfinite().all()
    assert gradient[1, 3:].eq(0).all()


@pytest.mark.parametrize("scale", [100.0, 10_000.0])
def test_scores_far_beyond_what_exp_can_hold_still_give_a_softmax(scale: float) -> None:
    layer = EncoderCrossAttention(WIDTH, NUM_HEADS, 1e-5)
    randomise(layer, seed=0)
    with torch.no_grad():
        layer.q_proj.weight *= scale
        slots, byte_states = random_states(1, 1, 2, WIDTH, seed=1), random_states(1, NUM_BYTES, WIDTH, seed=2)
        read = layer(slots[0], byte_states[0], torch.zeros(NUM_BYTES, dtype=torch.long))
        expected = dense_cross_attention(layer, slots[0, 0], byte_states[0], torch.ones(2, NUM_BYTES, dtype=torch.bool))
    torch.testing.assert_close(read[0], expected, atol=1e-4, rtol=0)


def test_a_slot_ignores_the_bytes_of_other_patches_to_the_bit() -> None:
    layer = EncoderCrossAttention(WIDTH, NUM_HEADS, 1e-5)
    randomise(layer, seed=0)
    slots, byte_states = random_states(2, NUM_PATCHES, 2, WIDTH, seed=1), random_states(2, NUM_BYTES, WIDTH, seed=2)
    with torch.no_grad():
        before = gather(layer, slots, byte_states)
        byte_states[0, 3] += 1.0  # in patch 2 of row 0
        after = gather(layer, slots, byte_states)
    changed = (before != after).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("theta", [100.0, 500_000.0])
def test_rotation_turns_pair_i_of_position_p_by_its_angle(theta: float) -> None:
    head_dim, num_positions = 6, 40
    heads = random_states(2, NUM_HEADS, num_positions, head_dim, seed=3).detach()
    turned = rotate(heads, rotary_rotation(num_positions, head_dim, theta, CPU))
    for position in range(num_positions):
        for i in range(head_dim // 2):
            angle = position * theta ** (-2 * i / head_dim)
            x, y = heads[:, :, position, 2 * i], heads[:, :, position, 2 * i + 1]
            expected = torch.stack(
                [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)], -1
            )
            torch.testing.assert_close(turned[:, :, position, 2 * i : 2 * i + 2], expected, atol=1e-5, rtol=0)


def test_rotated_scores_depend_on_the_distance_only() -> None:
    query, key = (random_states(1, 1, 1, 8, seed=seed).detach().expand(1, 1, 50, 8) for seed in (4, 5))
    rotation = rotary_rotation(50, 8, 10_000.0, CPU)
    scores = (rotate(query, rotation) @ rotate(key, rotation).mT)[0, 0]
    for distance in (-20, -1, 0, 3, 30):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert scores.diagonal(3)[0] != pytest.approx(scores.diagonal(4)[0].item(), abs=1e-3)
