"""A decoder that multiplies by its output head for one token of each sequence only: the last that its mask has.

Of a prompt only that token's logits choose what comes next, while those of all take as long as a quarter of the rest.
onnxruntime-genai's builder has `prune_lm_head`, which takes the last place instead; in a batch that is padded at the
end that would be no token of the shorter sequences.
"""

from __future__ import annotations

from typing import Any

LOGITS = "logits"


def keep_last(model: Any) -> None:
    """Changes the ONNX `model` so; `logits` become (B, 1, V). A graph that does not end in a head stays as it is."""
    from onnx import helper

    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    chain = [producers[LOGITS]]
    while chain[-1].op_type != "MatMul":
        before = [producers[name] for name in chain[-1].input if name in producers]
        moving = [node for node in before if node.op_type != "Constant"]
        if len(moving) != 1:
            return
        chain += moving
    head = chain[-1]
    hidden, taken = head.input[0], "last_hidden_state"
    constants = [("last_one", [1]), ("last_zero", [0])]
    new = [
        *(
            helper.make_node("Constant", [], [name], value_ints=value, name=f"/last/{name}")
            for name, value in constants
        ),
        helper.make_node("Shape", ["attention_mask"], ["last_mask_shape"], start=1, end=2, name="/last/mask"),
        helper.make_node("Shape", ["input_ids"], ["last_step_shape"], start=1, end=2, name="/last/step"),
        helper.make_node("Sub", ["last_mask_shape", "last_step_shape"], ["last_past"], name="/last/past"),
        helper.make_node(
            "ArgMax", ["attention_mask"], ["last_token"], axis=1, keepdims=1, select_last_index=1, name="/last/token"
        ),
        helper.make_node("Sub", ["last_token", "last_past"], ["last_in_step"], name="/last/in_step"),
        helper.make_node("Max", ["last_in_step", "last_zero"], ["last_index"], name="/last/index"),
        helper.make_node("Unsqueeze", ["last_index", "last_one"], ["last_indices"], name="/last/indices"),
        helper.make_node("GatherND", [hidden, "last_indices"], [taken], batch_dims=1, name="/last/hidden"),
    ]
    head.input[0] = taken
    place = next(index for index, node in enumerate(graph.node) if node == head)
    for offset, node in enumerate(new):
        graph.node.insert(place + offset, node)
    stale = {output for node in chain for output in node.output}
    kept = [info for info in graph.value_info if info.name not in stale]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    (logits,) = [output for output in graph.output if output.name == LOGITS]
    logits.type.tensor_type.shape.dim[1].Clear()
    logits.type.tensor_type.shape.dim[1].dim_value = 1
