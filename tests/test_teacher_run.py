"""The teacher run keeps a GPU busy: few kernels, no waiting, and a writer that works beside it."""

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from nemo_models import restore
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_kd.teacher.run import InOrder

KINDS = ("top_k", "top_p", "sample")
# Of a GPU these make the CPU wait.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
VIEWS = ("view", "slice", "select", "expand", "unsqueeze", "split", "detach", "alias", "t.default")


class Kernels(TorchDispatchMode):
    """Counts the operations that are kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith("index"):  # by a mask, it would first look where the mask is true
            indices = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
            is_mask = any(torch.is_tensor(each) and each.dtype == torch.bool for each in indices)
            name = f"nonzero for {name}" if is_mask else name
        if not name.startswith(VIEWS):
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def teacher_of(nemo: Path, tensor_parallel_size: int = 1, **selection: Any) -> Any:
    """The Teacher that the run makes of a .nemo."""
    from nemo_kd.nemo import cpu_backend

    cpu_backend.enable()
    from nemo_kd.nemo.dump import _replica_and_forward
    from nemo_kd.selection import SelectionConfig

    model = restore(nemo, tensor_parallel_size)
    return _replica_and_forward(model, SelectionConfig(**selection))[1]


def count_kernels(rank: int, world_size: int, nemo: Path) -> dict[str, Counter[str]]:
    """The kernels of a selection of 16,384 tokens out of V = 128,256, by its kind."""
    from nemo_kd.selection import SelectionConfig

    teacher = teacher_of(nemo)
    teacher.vocab_size, teacher.replica.leads = 128_000, False
    # Tensors without content: an operation that waits for a value fails on them.
    teacher._positions = torch.arange(16_384, device="meta")
    teacher._keys = torch.arange(16_384, device="meta")
    hidden = torch.empty(16_384, 1, 64, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(128_256, 64, device="meta", dtype=torch.bfloat16)
    counts = {}
    for kind in KINDS:
        teacher.selection = SelectionConfig(kind=kind)
        with Kernels() as kernels:
            teacher._select(hidden, weight)
        counts[kind] = kernels.counts
    return counts


def test_kernels_of_a_selection(nemos: dict[str, Path]) -> None:
    (counts,) = run_distributed(count_kernels, 1, nemos["untied"])
    most = {"top_k": 1_600, "top_p": 1_900, "sample": 1_800}
    for kind, kernels in counts.items():
        assert not [name for name in kernels if name.startswith(WAITS)]
        assert kernels["mm.default"] == 16, "blocks of 512 MiB"
        assert kernels.total() <= most[kind], kernels


def rows_of_changed(
    rank: int, world_size: int, nemo: Path, capped: bool, sharded: bool
) -> list[torch.Tensor]:
    """Rows of a Teacher, and what they should be, out of the model's logits."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from nemo_kd.selection import select_teacher_rows

    teacher = teacher_of(nemo, world_size, k=7)
    layer, hidden = teacher._layer, torch.randn(6, 2, 64, generator=torch.manual_seed(0))
    weight = layer.weight
    logits = hidden @ weight.detach().t()
    if capped:

        class Capped(ColumnParallelLinear):
            def forward(self, *args: Any, **more: Any) -> Any:
                logits, bias = super().forward(*args, **more)
                return logits.tanh(), bias

        layer.__class__ = Capped
        teacher._layer_forward = Capped.forward.__get__(layer)
        logits = logits.tanh()
    group = parallel_state.get_tensor_model_parallel_group()
    teacher._positions = torch.tensor([0, 3, 4, 11])
    teacher._keys = torch.zeros(4, dtype=torch.long)
    if sharded:
        teacher._is_sharded_by_sequence = True
        hidden = hidden.chunk(world_size)[rank]
    with torch.no_grad():
        teacher._select(hidden, weight)
        expected = select_teacher_rows(
            logits.flatten(0, 1)[teacher._positions], teacher.selection, teacher.vocab_size, group
        )
    return [*teacher._rows.wait(), *expected]


@pytest.mark.parametrize(("capped", "sharded"), [(True, False), (False, True), (True, True)])
def test_output_layers_that_do_more_and_sequences_in_parts(
    nemos: dict[str, Path], capped: bool, sharded: bool
) -> None:
    world_size = 2 if sharded else 1
    for tensors in run_distributed(rows_of_changed, world_size, nemos["untied"], capped, sharded):
        for got, expected in zip(tensors[:3], tensors[3:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_thread_works_in_order_beside_its_owner() -> None:
    done: list[int] = []
    go = threading.Event()

    def work(number: int) -> None:
        go.wait(timeout=60)
        done.append(number)

    with InOrder(2) as thread:
        thread.submit(lambda: work(0))
        thread.submit(lambda: work(1))
        assert done == [], "the owner goes on"
        waiting = threading.Thread(target=lambda: thread.submit(lambda: work(2)))
        waiting.start()
        waiting.join(timeout=0.2)
        assert waiting.is_alive(), "two wait, so that the third submit waits too"
        go.set()
        waiting.join()
    assert done == [0, 1, 2], "all is done at the end"


def test_an_error_in_the_thread_reaches_its_owner() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("the disk is full")

    def submit_all() -> None:
        with InOrder(2) as thread:
            thread.submit(fail)
            for _ in range(100):
                thread.submit(lambda: done.append(1))

    with pytest.raises(OSError, match="the disk is full"):
        submit_all()
    assert len(done) < 100


def test_an_error_of_the_owner_ends_the_thread() -> None:
    done: list[int] = []

    def stop() -> None:
        with InOrder(2) as thread:
            thread.submit(lambda: time.sleep(0.2))
            thread.submit(lambda: done.append(1))
            sys.exit()

    with pytest.raises(SystemExit):
        stop()
    assert done == [], "what had not begun is left"
