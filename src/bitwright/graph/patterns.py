"""What a recorded dataflow means: folds, fusions, shared inputs, residual adds, heads, parameters read elsewhere.

Each pattern is a function of a `Dataflow` and the model; nothing here changes the model.
"""

from __future__ import annotations

from torch import nn

from bitwright.graph.calls import KINDS
from bitwright.graph.dataflow import ADDS, Dataflow, Node

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
COMPUTING = (*WEIGHTED, *RECURRENT, nn.MultiheadAttention)
"""Leaves that hold weights and compute; all but embeddings."""
_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Flatten, nn.Unflatten)
_VIEWS = frozenset(
    "view reshape transpose permute contiguous unsqueeze squeeze expand flatten unflatten to float type_as clone "
    "detach dropout chunk split getitem select narrow movedim swapaxes get".split()
)
_OUTPUT_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
_OUTPUT_ONLY = frozenset("softmax log_softmax sigmoid log_sigmoid argmax".split())


def fold_batchnorms(flow: Dataflow, model: nn.Module) -> dict[str, str]:
    """``{conv or linear path: batch norm path}`` for pairs called once, where the norm is the only consumer.

    >>> import torch
    >>> from bitwright.graph.dataflow import record
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold_batchnorms(record(model, torch.zeros(1, 3, 8, 8)), model)
    {'0': '1'}
    """
    pairs = {}
    for node in flow.nodes:
        module = _module(node, model)
        if not isinstance(module, WEIGHTED) or len(node.users) != 1 or node.index in flow.outputs:
            continue
        user = flow.nodes[node.users[0]]
        norm = _norm(user, model)
        once = len(flow.calls(node.name)) == len(flow.calls(user.name)) == 1
        if norm is not None and norm.track_running_stats and once and _channels_match(module, norm, user):
            pairs[node.name] = user.name
    return pairs


def _channels_match(module: nn.Module, norm: _Norm, call: Node) -> bool:
    """A norm normalises axis 1; a linear layer's channels are its last axis, which is the same one only in 2-D."""
    outputs = module.out_channels if isinstance(module, _TRANSPOSED) else module.weight.shape[0]  # type: ignore[index]
    return norm.num_features == outputs and (not isinstance(module, nn.Linear) or len(call.shapes[0]) == 2)


def fusions(flow: Dataflow, model: nn.Module) -> list[tuple[str, ...]]:
    """Chains that a runtime computes as one: Conv+BN, Conv+BN+ReLU, Conv+ReLU, Linear+ReLU, BN+ReLU.

    A functional ReLU appears as ``relu``. Chains follow single consumers only.

    >>> import torch
    >>> from bitwright.graph.dataflow import record
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> fusions(record(model, torch.zeros(1, 3, 8, 8)), model)
    [('0', '1', '2')]
    """
    chains, taken = [], set()
    for node in flow.nodes:
        weighted = isinstance(_module(node, model), WEIGHTED)
        if node.index in taken or not (weighted or _norm(node, model)):
            continue
        chain = [node]
        if follower := _only_user(flow, chain[-1]):
            if weighted and _norm(follower, model):
                chain.append(follower)
        follower = _only_user(flow, chain[-1])
        if follower and _is_relu(follower, model):
            chain.append(follower)
        taken.update(part.index for part in chain)
        if len(chain) > 1:
            chains.append(tuple(part.name for part in chain))
    return chains


def shared_inputs(flow: Dataflow, paths: list[str]) -> list[list[str]]:
    """Groups of module paths (out of ``paths``, each called once) that consume one and the same tensor."""
    consumers: dict[int, list[str]] = {}
    for node in flow.nodes:
        if node.kind == "module" and node.name in paths and len(flow.calls(node.name)) == 1 and node.inputs:
            consumers.setdefault(node.inputs[0], []).append(node.name)
    return [group for group in consumers.values() if len(group) > 1]


def residual_adds(flow: Dataflow, model: nn.Module) -> list[Node]:
    """Functional adds of two equal shapes whose branches part at a common tensor and hold a weighted layer.

    The shape of the graph decides, not the name: rotary embeddings and position embeddings add too.
    """
    found = []
    for node in flow.nodes:
        if node.kind != "function" or node.name not in ADDS or len(node.inputs) != 2:
            continue
        if node.shapes[0] != node.shapes[1] or node.inputs[0] == node.inputs[1]:
            continue
        left, right = (ancestors(flow, source) for source in node.inputs)
        if left & right and _computed(flow, left ^ right, model):
            found.append(node)
    return found


def products(flow: Dataflow, kind: str, model: nn.Module) -> list[Node]:
    """Functional products of activations (``matmul`` or ``attention``) whose operands weighted layers made.

    Rotary tables are made by products too, of positions; those are none of these.
    """
    return [
        node
        for node in flow.nodes
        if node.kind == "function"
        and node.name in KINDS[kind].recorded
        and -1 not in node.sources[:2]
        and all(_computed(flow, ancestors(flow, source), model) for source in node.sources[:2])
    ]


def concatenations(flow: Dataflow, model: nn.Module) -> list[Node]:
    """Functional concatenations of different tensors, some made by weighted layers; not of parts of one tensor."""
    found = []
    for node in flow.nodes:
        if node.kind == "function" and node.name in KINDS["cat"].recorded and len(set(node.inputs)) > 1:
            above = [ancestors(flow, source) for source in node.inputs]
            apart = [flow.nodes[i] for i in set.union(*above) - set.intersection(*above)]
            parts = all(n.name == "neg" or is_view(n, model) for n in apart)  # rotary embeddings turn halves
            if not parts and _computed(flow, set.union(*above), model):
                found.append(node)
    return found


def _computed(flow: Dataflow, indices: set[int], model: nn.Module) -> bool:
    return any(_computes(_module(flow.nodes[i], model)) for i in indices)


def _computes(module: nn.Module | None) -> bool:
    """Whether a leaf multiplies by a matrix of its own; layers of model libraries do too."""
    if isinstance(module, COMPUTING) or module is None:
        return module is not None
    matrices = (p for p in module.parameters(recurse=False) if p.dim() > 1)
    return not isinstance(module, nn.Embedding | nn.EmbeddingBag) and next(matrices, None) is not None


def feeds_layernorm(flow: Dataflow, node: Node, model: nn.Module) -> bool:
    """Whether a consumer of ``node`` (through views) is a layer norm or RMS norm, which stays in float."""
    for user in (flow.nodes[i] for i in node.users):
        kind = type(_module(user, model)).__name__ if user.kind == "module" else user.name
        if "LayerNorm" in kind or "RMSNorm" in kind or kind in ("layer_norm", "rms_norm"):
            return True
        if is_view(user, model) and feeds_layernorm(flow, user, model):
            return True
    return False


def classifiers(flow: Dataflow, model: nn.Module) -> list[str]:
    """Linear layers whose output is a model output, directly or through views, softmax or sigmoid."""
    found = []
    for index in flow.outputs:
        node = flow.nodes[index]
        while node.inputs and (is_view(node, model) or _is_output_only(node, model)):
            node = flow.nodes[node.inputs[0]]
        if isinstance(_module(node, model), nn.Linear) and node.name not in found:
            found.append(node.name)
    return found


def first_layers(flow: Dataflow, model: nn.Module) -> list[str]:
    """Weighted and recurrent layers that no such layer or embedding feeds: they see the raw input."""
    found = []
    for node in flow.nodes:
        if isinstance(_module(node, model), COMPUTING) and node.inputs and node.name not in found:
            above = ancestors(flow, node.inputs[0])
            if not any(
                isinstance(_module(flow.nodes[i], model), (*COMPUTING, nn.Embedding, nn.EmbeddingBag)) for i in above
            ):
                found.append(node.name)
    return found


def bypassed_parameters(flow: Dataflow) -> dict[str, str]:
    """``{parameter: function}`` for parameters that a function read while their module's forward was not running."""
    return {name: node.name for node in flow.nodes for name in node.reads}


def _module(node: Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(node.name) if node.kind == "module" else None


def _norm(node: Node, model: nn.Module) -> _Norm | None:
    """The batch norm that ``node`` calls. Not a subclass of one, which may compute more (timm's applies a ReLU too)."""
    module = _module(node, model)
    return module if isinstance(module, _NORMS) and type(module) in _NORMS else None


def is_view(node: Node, model: nn.Module) -> bool:
    """Whether a call passes its values on unchanged, whatever their shape."""
    return isinstance(_module(node, model), _TRANSPARENT) or (node.kind == "function" and node.name in _VIEWS)


def _is_output_only(node: Node, model: nn.Module) -> bool:
    if node.kind == "module":
        return isinstance(_module(node, model), _OUTPUT_MODULES)
    return node.name in _OUTPUT_ONLY


def _is_relu(node: Node, model: nn.Module) -> bool:
    return isinstance(_module(node, model), nn.ReLU) or (node.kind == "function" and node.name in ("relu", "relu_"))


def _only_user(flow: Dataflow, node: Node) -> Node | None:
    return flow.nodes[node.users[0]] if len(node.users) == 1 and node.index not in flow.outputs else None


def ancestors(flow: Dataflow, index: int) -> set[int]:
    """Indices of all calls that the result of call ``index`` depends on, itself included."""
    seen: set[int] = set()
    queue = [index]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue.extend(flow.nodes[current].inputs)
    return seen
