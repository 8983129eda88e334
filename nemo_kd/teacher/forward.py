"""Micro batches through Megatron's forward schedule to the teacher's rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.selection import SelectionConfig, TeacherRows, select_teacher_rows
from nemo_kd.teacher.replica import Replica
from nemo_kd.vocab_parallel import all_gather

# Of the float32 logits that exist at once.
_LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


@dataclass
class HostRows:
    """The rows of a micro batch, on their way to the CPU's memory."""

    rows: TeacherRows
    arrival: Any = None  # a torch.cuda.Event; None: they are there

    def wait(self) -> TeacherRows:
        """Return the rows once they are there. Any thread may wait."""
        if self.arrival is not None:
            # A new thread's device is the first GPU, where the wait would open a context.
            torch.cuda.set_device(self.arrival.device)
            self.arrival.synchronize()
        return self.rows


@dataclass
class Teacher:
    """The model, forward only: micro batches to the rows of each.

    The output layer gets the hidden states of the supervised positions only, some at a time. So the
    logits of a whole micro batch never exist, and those of a prompt are not computed.

    On a GPU the CPU waits for no step of a micro batch: it finds the positions itself, and the copy
    of the rows is queued behind the micro batch's kernels.
    """

    model: Any  # what Megatron's schedule calls, with or without wrappers around `module`
    module: Any  # the GPTModel of this rank
    selection: SelectionConfig
    vocab_size: int  # the tokenizer's own size, without padding
    tp_group: ProcessGroup  # the ranks that share the vocabulary
    has_stages: bool  # whether the model is split into pipeline stages
    replica: Replica  # asked between forward passes whether to stop

    def __post_init__(self) -> None:
        self._device = next(self.module.parameters()).device
        self._positions: Tensor | None = None  # of the micro batch's supervised positions, [N]
        self._keys: Tensor | None = None  # the seeds of their draws, [N]
        self._rows: HostRows | None = None
        self.module.eval()
        # Micro batches have different lengths, which pipeline stages must tell each other. This is
        # set here, because Megatron refuses a config that says so for a mixture-of-experts key that
        # a dense model ignores.
        self.module.config.variable_seq_lengths = True
        layer = getattr(self.module, "output_layer", None)
        if layer is not None:  # on the last pipeline stage
            self._layer, self._layer_forward = layer, layer.forward
            self._is_sharded_by_sequence = layer.sequence_parallel
            layer.sequence_parallel = False  # because _select gathers what it would gather
            layer.forward = self._select
            self.module.compute_language_model_loss = lambda labels, _: torch.zeros_like(
                labels, dtype=torch.float32
            )

    def rows(self, batches: Sequence[dict[str, Tensor]]) -> list[HostRows]:
        """The rows of each micro batch's supervised positions, sample by sample.

        Args:
            batches: Of each the tensors tokens, position_ids, labels and loss_mask, [B, S], and
                sample_numbers, [B], on the CPU.

        Returns:
            On the rank that leads the replica, one for each micro batch; on other ranks of the last
            pipeline stage empty rows, and on other stages an empty list.
        """
        # Pipeline stages are at different micro batches, and can stop together only between calls.
        if self.has_stages:
            self.replica.stop_if_asked()
        with torch.no_grad():
            collected: list[HostRows] = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter(batches),
                model=self.model,
                num_microbatches=len(batches),
                seq_length=max(batch["tokens"].shape[1] for batch in batches),
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        return collected

    def _forward_step(self, batches: Iterator[dict[str, Tensor]], model: Any) -> Any:
        if not self.has_stages:
            self.replica.stop_if_asked()
        batch = next(batches)
        item, position = batch["loss_mask"].nonzero(as_tuple=True)
        # Megatron's hidden states are [S, B, H].
        self._positions = self._moved(position * len(batch["tokens"]) + item)
        # A key seeds the draws of its row. No layout, order or restart changes it.
        self._keys = self._moved(batch["sample_numbers"][item] << 32 | position)
        output = model(
            input_ids=self._moved(batch["tokens"]),
            position_ids=self._moved(batch["position_ids"]),
            attention_mask=None,
            labels=self._moved(batch["labels"]),
        )
        return output, lambda _, non_loss_data: self._rows

    def _moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the model's device; the copy waits for nothing."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _select(self, hidden: Tensor, weight: Tensor | None = None, **more: Any) -> Any:
        """Take the rows, in the place of the output layer's forward.

        Args:
            hidden: The hidden states [S, B, H], [S / TP, B, H] with sequence parallelism.
            weight: The output weight [Vp, H] of tied embeddings.
            **more: What else Megatron gives to the output layer.

        Returns:
            What Megatron takes for the logits; nothing reads it.
        """
        assert self._positions is not None
        assert self._keys is not None
        if self._is_sharded_by_sequence:
            # Each rank needs the hidden states of all positions for its part of the vocabulary.
            hidden = torch.cat(all_gather(hidden, self.tp_group))
        states = hidden.flatten(0, 1).index_select(0, self._positions)
        project = self._projection(states, weight, more)
        num_columns = len(self._layer.weight if weight is None else weight)
        num_bytes = _LOGITS_BYTES.get(states.device.type, _LOGITS_BYTES["cuda"])
        num_tokens = max(1, num_bytes // (4 * num_columns))
        parts = [
            select_teacher_rows(
                project(chunk), self.selection, self.vocab_size, self.tp_group, keys
            )
            for chunk, keys in zip(
                states.split(num_tokens), self._keys.split(num_tokens), strict=True
            )
        ]
        rows = TeacherRows(*(torch.cat(part) for part in zip(*parts, strict=True)))
        self._rows = _on_host(rows) if self.replica.leads else HostRows(rows)
        return hidden[:, :, :1], None

    def _projection(self, states: Tensor, weight: Tensor | None, more: dict[str, Any]) -> Any:
        """The function from hidden states [n, H] to logits [n, Vp]."""
        layer = self._layer
        if type(layer) is not ColumnParallelLinear or layer.bias is not None:
            # It does more than a product, such as Gemma 2's cap of the logits.
            return lambda chunk: self._layer_forward(chunk[:, None], weight=weight, **more)[0][:, 0]
        device = self._device.type
        dtype = states.dtype
        if torch.is_autocast_enabled(device):  # as it would have cast the output layer's input
            dtype = torch.get_autocast_dtype(device)
        matrix = (layer.weight if weight is None else weight).to(dtype).t()
        # Products of half precision come out in float32: bfloat16 would round a logit of 20 to a
        # multiple of 0.125.
        keeps_float32 = (
            states.is_cuda and dtype.itemsize == 2 and hasattr(torch.ops.aten.mm, "dtype")
        )
        options = {"out_dtype": torch.float32} if keeps_float32 else {}

        def project(chunk: Tensor) -> Tensor:
            with torch.autocast(device, enabled=False):
                return torch.mm(chunk.to(dtype), matrix, **options)

        return project


def _on_host(rows: TeacherRows) -> HostRows:
    """The rows in the CPU's memory; a copy from a GPU is only begun."""
    if rows.topk_ids.device.type == "cpu":
        return HostRows(rows)
    targets = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in rows]
    for target, part in zip(targets, rows, strict=True):
        target.copy_(part, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return HostRows(TeacherRows(*targets), arrival)
