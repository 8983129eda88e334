"""The engine of plain torch operations, for any device and type: reference and CPU path.

An engine does what is as wide as the vocabulary: `measure` reads a chunk of logits, and `spread`
reads it again and writes its gradient. It sees one chunk `[n, Vp]` at a time.
"""

import torch
from torch import Tensor

from nemo_kd.loss.chunk import Classes, Gradient, Local
from nemo_kd.loss.objective import KDLossConfig
from nemo_kd.vocab_parallel import LOG2_E

# The size of a chunk of tokens in the computing type. On a CPU a chunk has to stay in the cache
# between the operations on it, and yet has to outweigh the small operations that each chunk costs.
# On a GPU it has to outweigh the kernel launches.
CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 128 * 2**20}


class EagerEngine:
    """Computes in `dtype`, in memory for one chunk that all chunks of a walk share.

    With `overwrites`, nobody reads the logits again: where their memory can carry the exponentials
    from `measure` to `spread`, it does.
    """

    def __init__(self, logits: Tensor, dtype: torch.dtype, config: KDLossConfig, overwrites: bool):
        self.dtype, self.config = dtype, config
        # The gradient has one exponential only: another would have no place.
        has_one = config.temperature == 1 or config.tail == "renormalize"
        self.carries = overwrites and logits.dtype == dtype and has_one
        self._memory: dict[str, Tensor] = {}

    def chunk_tokens(self, logits: Tensor) -> int:
        """How many tokens of `[..., Vp]` a chunk has."""
        chunk_bytes = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cuda"])
        return max(1, chunk_bytes // max(1, logits.shape[-1] * self.dtype.itemsize))

    def measure(self, logits: Tensor, classes: Classes) -> Local:
        """This shard's statistics of a chunk `[n, Vp]`."""
        entries = logits.gather(1, classes.column).to(self.dtype)
        entries.masked_fill_(classes.foreign, -torch.inf)
        work = logits if self.carries else self._scratch("work", logits)
        source = self._without_entries(logits, classes.column, classes.foreign, work)
        # Finite even where nothing is left of the row, or -inf - -inf would be NaN.
        peak = source.amax(-1).to(self.dtype).clamp_(min=torch.finfo(self.dtype).min)
        torch.sub(source, peak[:, None], out=work)
        if self.config.temperature == 1:
            total = total_t = _exp(work, 1.0, work).sum(-1)
        else:
            work_t = self._scratch("work_t", logits)
            total_t = _exp(work, 1 / self.config.temperature, work_t).sum(-1)
            total = _exp(work, 1.0, work).sum(-1)
        return Local(entries, peak, total, total_t)

    def spread(self, logits: Tensor, gradient: Gradient, weights: Tensor, out: Tensor) -> None:
        """Writes `weights * dloss/dz` of a chunk to `out` `[n, Vp]`, which may be the logits."""
        work = out if out.dtype == self.dtype else self._scratch("work", logits)
        tempered = None
        if not self.carries:
            source = self._without_entries(logits, gradient.column, gradient.foreign, work)
            torch.sub(source, gradient.peak[:, None], out=work)
            if gradient.scale_t is not None:
                # Before `work` is overwritten by its own exponential.
                work_t = self._scratch("work_t", logits)
                tempered = _exp(work, 1 / self.config.temperature, work_t)
            _exp(work, 1.0, work)
        work.mul_((gradient.scale * weights)[:, None])
        if tempered is not None and gradient.scale_t is not None:
            work.addcmul_(tempered, (gradient.scale_t * weights)[:, None])
        # Added: an entry's cell may be the label's too, and foreign entries add 0 to column 0.
        sparse = (gradient.sparse * weights[:, None]).masked_fill_(gradient.foreign, 0)
        work.scatter_add_(1, gradient.column, sparse)
        if work is not out:
            out.copy_(work)

    def free(self) -> None:
        """Gives the memory back; the next chunk allocates it again."""
        self._memory.clear()

    def _without_entries(
        self, logits: Tensor, column: Tensor, foreign: Tensor, work: Tensor
    ) -> Tensor:
        """The logits, with tail "bucket" without the entries: in `work`, unless they are as here.

        There the entries are -inf, so that a sum is over the outside only, and never 1 minus
        another sum.
        """
        # A GPU subtracts in float32 whatever the logits' type; a CPU is slow at mixed types.
        mixes = logits.dtype == self.dtype or logits.is_cuda
        if mixes and self.config.tail != "bucket":
            return logits
        work.copy_(logits)
        if self.config.tail == "bucket":
            # Added, not assigned: a foreign entry stands at column 0, whose logit must stay.
            exclusion = torch.zeros_like(foreign[:, :-1], dtype=self.dtype)
            exclusion.masked_fill_(~foreign[:, :-1], -torch.inf)
            work.scatter_add_(1, column[:, :-1], exclusion)
        return work

    def _scratch(self, name: str, chunk: Tensor) -> Tensor:
        """The memory of this name for a chunk; the first chunk that asks for it is the largest."""
        if name not in self._memory:
            self._memory[name] = chunk.new_empty(chunk.shape, dtype=self.dtype)
        return self._memory[name][: len(chunk)]


def _exp(exponent: Tensor, factor: float, out: Tensor) -> Tensor:
    """exp(factor * exponent) in `out`, which may be `exponent`."""
    if out.is_cuda:
        return torch.exp(exponent if factor == 1 else torch.mul(exponent, factor, out=out), out=out)
    return torch.mul(exponent, factor * LOG2_E, out=out).exp2_()
