"""The settings of a run: how answers are drawn, the server, and the cache of their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash
from omegaconf import DictConfig, OmegaConf

from nemo_kd.config import DataConfig, read_settings, refuse_unknown_keys
from nemo_kd.yaml_rules import check_yaml_values

_SECTIONS = ("engine", "device", "output", "batch_size", "model", "data", "sampling", "server")


@dataclass(frozen=True)
class SamplingConfig:
    """`sampling`: how an answer is drawn.

    Raises:
        ValueError: A number is out of its range, or `stop` holds no texts.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 1234
    stop: tuple[str, ...] = ()
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name, lowest in ("n", 1), ("top_k", 0), ("seed", 0), ("max_tokens", 1):
            if getattr(self, name) < lowest:
                raise ValueError(f"expected {name} >= {lowest}, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"expected temperature >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected top_p above 0, at most 1, got {self.top_p}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"expected stop=[TEXT,...], got {list(self.stop)}")

    def seed_of(self, prompt: int, answer: int) -> int:
        """The seed of one answer, below 2^31, which any server takes."""
        return xxhash.xxh3_64_intdigest(f"{self.seed}/{prompt}/{answer}".encode()) & (2**31 - 1)


@dataclass(frozen=True)
class ServerConfig:
    """`server`: where it is and how it is asked."""

    base_url: str | None = None
    model: str | None = None
    max_in_flight: int = 64
    max_retries: int = 8
    timeout_s: float = 600.0
    max_failures: int = 10


@dataclass(frozen=True)
class CaptureConfig:
    """`capture`: the cache of the rows of the written tokens; none without a path."""

    path: str | None = None
    k: int = 100
    codec: str = "packed"
    samples_per_shard: int = 1024


class Settings(NamedTuple):
    """What a run reads of its YAML."""

    data: DataConfig
    sampling: SamplingConfig
    server: ServerConfig
    capture: CaptureConfig


def read_all(config: DictConfig) -> Settings:
    """Read and check the YAML, before anything else is read.

    Raises:
        ValueError: A key that nothing reads, or a value that does not fit; names the key.
    """
    check_yaml_values(config, "generate_answers")
    refuse_unknown_keys(config, (*_SECTIONS, "capture"))
    refuse_unknown_keys(config.model, ("hf_path", "dtype"), "model")
    data: Any = OmegaConf.to_container(config.data, resolve=True)
    # Nothing is truncated here; the dump's default names a key that a template may lack.
    data.setdefault("truncation_field", data.get("label_key", "output"))
    settings = Settings(
        read_settings(DataConfig, data, "data"),
        read_settings(SamplingConfig, config.sampling, "sampling"),
        read_settings(ServerConfig, config.server, "server"),
        read_settings(CaptureConfig, config.capture, "capture"),
    )
    if config.engine == "server":
        for name in ("base_url", "model"):
            if getattr(settings.server, name) is None:
                raise ValueError(f"server.{name}: expected a text with engine=server, got null")
    return settings
