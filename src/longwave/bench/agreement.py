"""No speed is reported on a wrong result: contenders must agree before anything is timed."""

from collections.abc import Mapping

from torch import Tensor

from longwave.bench.peers import AUTOCAST, Peer, Trainable
from longwave.errors import LongwaveError

TOLERANCE = 1e-3  # of the largest logit, of the loss, of the norm of all gradients
EXACT = ("float32", "f32")  # precisions that must agree so well
ROUGH = 5e-2  # under autocast, in training; what other precisions differ by is only reported


def check_logits(peers: Mapping[str, Peer], tokens: list[int], truth: str) -> dict:
    """The largest differences from the logits of peer `truth`, as shares of its largest logit.

    For the logits after `tokens` at once (`prefill`), and after their first three quarters and the rest in single
    steps (`steps`). Raises LongwaveError if a peer in float32 differs by more than TOLERANCE.
    """
    reference = peers[truth].prefill(tokens)
    scale = reference.abs().max().item()
    differences = {}
    for name, peer in peers.items():
        found = {"prefill": peer.prefill(tokens), "steps": _in_steps(peer, tokens)}
        differences[name] = {how: (x - reference).abs().max().item() / scale for how, x in found.items()}
        for how, difference in differences[name].items():
            _judge(name, f"logits ({how})", difference)
    return {"tokens": len(tokens), "tolerance": TOLERANCE, "largest_logit": scale, "differences": differences}


def check_training(peers: Mapping[str, Trainable], tokens: Tensor, targets: Tensor, truth: str) -> dict:
    """The relative differences in loss and in the norm of all gradients from peer `truth`; raises as `check_logits`,
    and if one under autocast differs by more than ROUGH.

    tokens, targets (b, l).
    """
    losses = {name: peer.train_step(tokens, targets) for name, peer in peers.items()}
    norms = {name: peer.gradient_norm() for name, peer in peers.items()}
    differences = {}
    for name in peers:
        found = {"loss": losses[name] / losses[truth], "gradient": norms[name] / norms[truth]}
        differences[name] = {what: abs(share - 1) for what, share in found.items()}
        for what, difference in differences[name].items():
            _judge(name, what, difference)
    return {"tokens": tokens.numel(), "tolerance": TOLERANCE, "loss": losses[truth], "differences": differences}


def _in_steps(peer: Peer, tokens: list[int]) -> Tensor:
    start = max(1, len(tokens) * 3 // 4)
    logits = peer.begin(tokens[:start])
    for token in tokens[start:]:
        logits = peer.step(token)
    return logits


def _judge(name: str, what: str, difference: float) -> None:
    allowed = TOLERANCE if name.endswith(EXACT) else ROUGH
    if name.endswith((*EXACT, AUTOCAST)) and not difference <= allowed:
        raise LongwaveError(
            f"{name}: {what} differ by {difference:.1e} of the reference, more than {allowed:.0e}: "
            "nothing was timed; leave it out with --peers, and report it"
        )
