"""What architectures call their linears, for all that needs to know their roles. Everything else finds them by type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
"""Engines run these as one layer, so of each set all are packed or none."""
MULTIPLIED_DIRECTLY = {"dt_proj"}
"""Of state-space layers: small, and their modules read the weight and do not call the linear."""
ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Linears of few rows whose outputs choose experts, or weigh them; or the modules that these are in."""
CROSS_ATTENTION = {"encoder_attn", "crossattention", "cross_attn"}
"""Of decoders that were made for an encoder beside them."""
HEAD_NORMS = {"q_norm", "k_norm"}
"""Norms of one attention head's queries or keys, which do not span the hidden dimension."""


@dataclass(frozen=True)
class Stacks:
    """How a module stacks the weights of its experts: `gate_up_proj` and `down_proj`, or `up_proj` without a gate."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    """Whether they are (experts, in, out), not (experts, out, in)."""
    is_concatenated: bool
    """Whether gate comes before up, not in turns with it."""
    sorted_inputs: bool = False
    """Whether it is given all tokens once for each expert, zero where that was not chosen, and not who was chosen."""


STACKS = {
    "Llama4TextExperts": Stacks(True, False, is_transposed=True, is_concatenated=True, sorted_inputs=True),
    "LongcatFlashExperts": Stacks(True, False, is_transposed=False, is_concatenated=True),
}
"""Of modules, by class, that do not say so themselves, as those do that `use_experts_implementation` is put on."""


@dataclass(frozen=True)
class Roles:
    """The linears of a decoder block by what they read and write; their channels can be permuted."""

    mlp_in: tuple[str, ...]
    mlp_out: str
    attention_out: str
    value: str
    fused_qkv: bool
    """Whether `value` holds queries and keys too, by head."""
    readers: frozenset[str]
    """Those whose inputs are the hidden states."""

    @property
    def writers(self) -> set[str]:
        """Those that add to the hidden states."""
        return {self.mlp_out, self.attention_out}


ROLES = {
    "Llama": Roles(
        mlp_in=("gate_proj", "up_proj"),
        mlp_out="down_proj",
        attention_out="o_proj",
        value="v_proj",
        fused_qkv=False,
        readers=frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
    ),
    "GPT-NeoX": Roles(
        mlp_in=("dense_h_to_4h",),
        mlp_out="dense_4h_to_h",
        attention_out="dense",
        value="query_key_value",
        fused_qkv=True,
        readers=frozenset({"query_key_value", "dense_h_to_4h"}),
    ),
}
"""Of the architectures, and all that call their linears alike (Mistral, Qwen and Gemma call them as Llama does)."""


def find_roles(kinds: set[str]) -> Roles | None:
    """The roles of blocks whose linears have exactly the names `kinds`, or None where these are not known."""
    return next((roles for roles in ROLES.values() if kinds == roles.readers | roles.writers), None)


def fused_sets(names: Iterable[str]) -> list[list[str]]:
    """The linears of `names` in sets that engines run as one layer, in order; most are alone."""
    sets: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, kind = name.rpartition(".")
        fused = next((index for index, kinds in enumerate(FUSED) if kind in kinds), kind)
        sets.setdefault((parent, fused), []).append(name)
    return list(sets.values())
