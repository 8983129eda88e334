"""Megatron's calls of torch.cuda, answered on a machine without a GPU: for a host's CPU backend."""

import functools
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")


def refuse_gpus(key: str) -> None:
    """Refuse the CPU backend, which `key`=cpu asks for, where the unpatched code can run.

    Raises:
        ValueError: CUDA is available.
    """
    if torch.cuda.is_available():
        raise ValueError(
            f"{key}=cpu asks for the CPU backend, but this machine has "
            f"{torch.cuda.device_count()} CUDA device(s); set {key}=gpu, or hide the devices with "
            "CUDA_VISIBLE_DEVICES=''"
        )


def answer_cuda_calls() -> None:
    """Patch this process so that what is asked of CUDA is done on the CPU.

    Call it after the host is imported: torch.jit.script reads the factories' sources there.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.manual_seed = torch.manual_seed
    # Megatron keeps one state for each of its generators: here they are states of the CPU's.
    cuda.get_rng_state = megatron_random._get_cuda_rng_state = get_rng_state
    cuda.set_rng_state = megatron_random._set_cuda_rng_state = set_rng_state
    for name in ("LongTensor", "FloatTensor", "IntTensor"):
        setattr(cuda, name, getattr(torch, name))
    for name in ("set_device", "synchronize", "empty_cache", "Stream"):
        setattr(cuda, name, _nothing())
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _nothing() -> Callable[..., None]:
    """A function of its own for each name: torch._dynamo refuses one that has two."""
    return lambda *_, **__: None


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same factory function, which takes device="cuda" for the CPU and does not pin memory."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


class _Stream:
    """A CUDA stream on the CPU, where everything is done when the call returns."""

    def wait_stream(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> "_Stream":
        return self

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...


def answer_streams() -> None:
    """Patch this process so that work on CUDA streams is done when it is asked for."""
    for name in ("Stream", "current_stream", "stream"):
        setattr(torch.cuda, name, functools.partial(lambda *_, **__: _Stream()))


def name_tensors_as_cuda() -> None:
    """Core's optimizer and gradient clipping know a float32 tensor by the name of its CUDA type."""
    tensor_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name  # type: ignore[assignment, method-assign]
