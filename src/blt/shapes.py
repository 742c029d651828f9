"""Every tensor that crosses a module boundary, by name: the glossary to read first.

Axis names: ``batch`` rows; ``byte`` positions in a row of ids, BOS and EOS included; ``byte_or_next`` those and the next,
unknown one; ``patch`` patches of a row; ``slot`` vectors that stand for one patch in cross-attention (the paper's k).
Tests check these types at every call (tests/conftest.py).
"""

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

# bytes
ByteIds = Int[Tensor, "batch byte"]  # 0..259: BOE 0, BOS 1, EOS 2, 3 unused, byte b is b + 4
DocumentIds = Int[Tensor, "batch position"]  # 0, 1, 2, ...: which document of its row a byte or patch belongs to

# entropies
EntropyLogits = Float[Tensor, "batch byte vocab"]  # entry t predicts id t + 1
Entropies = Float[Tensor, "batch byte_or_next"]  # nats; entry t: doubt about id t given ids < t; entry 0 is nan
EntropyEdges = Float[Tensor, " edge"]  # nats, ascending, at most 255: what a byte can tell apart
EntropyCodes = UInt8[Tensor, "batch byte"]  # entry t: how many edges lie below the doubt about id t + 1

# patches
PatchStarts = Bool[
    Tensor, "batch byte_or_next"
]  # entry t: does id t start a patch; the last entry is about the unknown next id
PatchIds = Int[Tensor, "batch byte"]  # the patch that holds byte t, counted from 0 in its row
NewestClosedPatch = Int[
    Tensor, "batch byte"
]  # the newest patch that is closed once it is known whether t + 1 starts one
PatchLengths = Int[Tensor, "batch patch"]  # bytes; 0 where a row has fewer patches than its batch
Segments = Int[
    Tensor, " flat_byte"
]  # bytes of all rows one after another: the flat_patch that holds, or is read by, each
PatchPositions = Int[Tensor, " flat_patch"]  # patches of all rows one after another: which of its row each is

# the network
ByteStates = Float[Tensor, "batch byte byte_dim"]
PatchStates = Float[Tensor, "flat_patch slots_dim"]  # slots_dim = slots_per_patch * encoder width
LatentStates = Float[Tensor, "flat_patch latent_dim"]
Logits = Float[Tensor, "batch byte vocab"]  # entry t predicts id t + 1

# attention
OldestRead = Int[Tensor, "batch position"]  # the first position that each position may read
Rotation = Float[Tensor, "*row position half_head_dim 2"]  # cosine and sine of the rotary angles, fp32
