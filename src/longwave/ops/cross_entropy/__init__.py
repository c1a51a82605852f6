"""Cross entropy of logits and its gradient in one go, for losses over a large vocabulary."""

from longwave.ops.cross_entropy.api import cross_entropy_

__all__ = ["cross_entropy_"]
