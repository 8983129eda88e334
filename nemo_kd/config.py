"""Typed settings out of Hydra's YAML, checked when read: a key that nothing reads is an error."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf

from nemo_kd.loss import KDLossConfig
from nemo_kd.selection import SelectionConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The formats of SFT data whose samples this package renders (nemo_kd/chat), and all formats.
RENDERED = ("messages", "sharegpt", "alpaca", "prompt_completion")
FORMATS = ("prompt", "nemo_chat", *RENDERED)
# The settings of `data` that the hosts' datasets take under the same name.
_OF_HOSTS = (
    *("max_seq_length", "label_key", "answer_only_loss", "truncation_field", "truncation_method"),
    *("add_bos", "add_eos", "add_sep", "sep_id"),
)
# The keys of NeMo's chat_prompt_tokens.
_CHAT_TOKENS = ("system_turn_start", "turn_start", "label_start", "end_of_turn", "end_of_name")


@dataclass(frozen=True)
class DataConfig:
    """The teacher run's `data`: what NeMo's SFT data keys of these names mean, and its defaults.

    `format` and the keys below it are ours.

    Raises:
        ValueError: A required key is missing or a number is out of its range.
    """

    file_names: tuple[str, ...] = ()
    format: str = "auto"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    train_on: str = "all_assistant"
    micro_batch_size: int = 4
    max_seq_length: int = 4096
    max_unsupervised_share: float = 0.1
    prompt_template: str = "{input} {output}"
    label_key: str = "output"
    truncation_field: str = "input"
    truncation_method: str = "right"
    answer_only_loss: bool = True
    add_bos: bool = False
    add_eos: bool = True
    add_sep: bool = False
    sep_id: int = 49704
    chat: bool = False
    chat_prompt_tokens: dict[str, str] | None = None
    hf_dataset: bool = False
    index_mapping_dir: str | None = None
    memmap_workers: int | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not self.file_names:
            raise ValueError("expected file_names=[train.jsonl,...], got none")
        # The first token is never predicted.
        for name, lowest in ("micro_batch_size", 1), ("max_seq_length", 2):
            if getattr(self, name) < lowest:
                raise ValueError(f"expected {name} >= {lowest}, got {getattr(self, name)}")
        if not 0 <= self.max_unsupervised_share <= 1:
            raise ValueError(
                f"expected max_unsupervised_share from 0 to 1, got {self.max_unsupervised_share}"
            )
        if self.truncation_method not in ("left", "right"):
            raise ValueError(
                f"expected truncation_method left or right, got {self.truncation_method!r}"
            )
        self._check_format()
        if self.chat or self.format == "nemo_chat":
            self._check_chat_tokens()
        elif self.format in ("auto", "prompt"):
            self._check_template()

    def _check_format(self) -> None:
        if self.format not in ("auto", *FORMATS):
            raise ValueError(f"expected format auto, {', '.join(FORMATS)}, got {self.format!r}")
        if self.chat and self.format not in ("auto", "nemo_chat"):
            raise ValueError(
                f"expected chat=false with format={self.format}, got true: chat=true stands for "
                "format=nemo_chat"
            )
        if self.train_on not in ("all_assistant", "last_assistant"):
            raise ValueError(
                f"expected train_on all_assistant or last_assistant, got {self.train_on!r}"
            )

    @property
    def is_rendered(self) -> bool:
        """Whether this package makes the samples, and not the host's dataset."""
        return self.format in RENDERED

    def with_format(self, found: str) -> "DataConfig":
        """The settings for files of this format, as `nemo_kd.chat.format_of` finds it."""
        return replace(self, format=found, chat=found == "nemo_chat")

    def _check_template(self) -> None:
        if not self.prompt_template.endswith(f"{{{self.label_key}}}"):
            raise ValueError(
                f"expected prompt_template to end in {{{self.label_key}}}, the label_key, got "
                f"{self.prompt_template!r}"
            )
        try:
            self.escaped_template.encode().decode("unicode_escape")  # as NeMo reads it
        except UnicodeDecodeError as error:
            raise ValueError(
                f"expected a prompt_template whose backslashes are escapes such as \\n, got "
                f"{self.prompt_template!r}: {error.reason}"
            ) from error
        keys = self.keys
        for field in self.truncation_field.split(","):
            if keys.count(field) != 1:
                raise ValueError(
                    f"expected truncation_field to name keys that prompt_template has once, of "
                    f"{', '.join(keys)}, got {self.truncation_field!r}"
                )

    def _check_chat_tokens(self) -> None:
        tokens = self.chat_prompt_tokens
        if tokens is None:
            return
        for problem, names in (
            ("no", [name for name in _CHAT_TOKENS if name not in tokens]),
            ("an unknown", [name for name in tokens if name not in _CHAT_TOKENS]),
            ("no text as", [name for name, text in tokens.items() if not _is_text(text)]),
        ):
            if names:
                raise ValueError(
                    f"expected chat_prompt_tokens with a text for each of "
                    f"{', '.join(_CHAT_TOKENS)}, got {problem} {names[0]}"
                )

    @property
    def host_settings(self) -> dict[str, Any]:
        """What a host's GPTSFTDataset is given, by its own names."""
        own = {name: getattr(self, name) for name in _OF_HOSTS}
        # min_seq_length is asked for, and never read.
        return own | {"prompt_template": self.escaped_template, "min_seq_length": 1}

    @property
    def escaped_template(self) -> str:
        """prompt_template as NeMo takes it: it would garble a letter that is not ASCII."""
        return self.prompt_template.encode("ascii", "backslashreplace").decode()

    @property
    def keys(self) -> list[str]:
        """The keys that each line of a jsonl must have."""
        if self.chat:
            return ["system", "conversations"]
        return re.findall(r"{(.*?)}", self.prompt_template)


@dataclass(frozen=True)
class CacheConfig:
    """The teacher run's `cache`: where it goes and how it is cut.

    Raises:
        ValueError: A required key is missing or a number is out of its range.
    """

    path: str = ""
    codec: str = "packed"
    samples_per_shard: int = 1024
    shards: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("expected path=DIRECTORY, got none")
        if self.codec not in ("raw", "packed"):
            raise ValueError(f"expected codec packed or raw, got {self.codec!r}")
        if self.samples_per_shard < 1:
            raise ValueError(f"expected samples_per_shard >= 1, got {self.samples_per_shard}")


# Keys of knowledge_distillation that may be a Schedule; a training logs their values.
SCHEDULED = ("kd_loss_weight", "sft_loss_weight", "temperature")


@dataclass(frozen=True)
class Schedule:
    """A number that changes with the global step: from start, at step 0, to end, at `steps`.

    constant keeps start until then; cosine is half a wave. From `steps` on it is end.

    Raises:
        ValueError: No such schedule, a missing number, or steps that are not positive.
    """

    schedule: str = ""
    start: float = math.nan
    end: float = math.nan
    steps: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"expected schedule constant, linear or cosine, got {self.schedule!r}")
        for name in ("start", "end"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"expected {name}, a finite number, got {getattr(self, name)}")
        if self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}")

    def at(self, step: int) -> float:
        """The value that the optimizer step after `step` others is taken with."""
        if step >= self.steps:
            return self.end
        share = {
            "constant": 0.0,
            "linear": step / self.steps,
            "cosine": (1 - math.cos(math.pi * step / self.steps)) / 2,
        }[self.schedule]
        return (1 - share) * self.start + share * self.end


@dataclass(frozen=True)
class DistillationConfig:
    """The student's `model.knowledge_distillation`: KDLossConfig over time, and how it is computed.

    Raises:
        ValueError: as KDLossConfig, at any step; a schedule of the temperature with a tail that
            takes the teacher as stored; logits_gather=full with the output layer fused in.
    """

    divergence: str = "forward_kl"
    tail: str = "label"
    temperature: float | Schedule = 1.0
    jsd_beta: float = 0.5
    kd_loss_weight: float | Schedule = 1.0
    sft_loss_weight: float | Schedule = 0.4
    logits_gather: str = "topk"
    fuse_output_layer: bool = False  # never hold the logits: less memory, some more time

    def __post_init__(self) -> None:
        # Within a schedule's range no value leaves the interval of its ends, and where two
        # weights are 0 at once they are so at step 0 or where a schedule ends.
        ends = [value.steps for value in vars(self).values() if isinstance(value, Schedule)]
        for step in (0, *ends):
            try:
                self.at(step)
            except ValueError as error:
                raise ValueError(f"{error} (at step {step})" if ends else str(error)) from error
        if isinstance(self.temperature, Schedule) and self.tail != "renormalize":
            raise ValueError(
                f"expected tail=renormalize with a schedule of the temperature, got {self.tail}, "
                "which takes the teacher as stored, at the one temperature of its dump; set "
                "tail=renormalize, or temperature to the dump's"
            )
        if self.fuse_output_layer and self.logits_gather == "full":
            raise ValueError(
                "expected logits_gather=topk with fuse_output_layer=true, which never holds the "
                "logits, got full; set one of the two otherwise"
            )

    def at(self, step: int) -> KDLossConfig:
        """The objective of the optimizer step after `step` others: schedules as their numbers."""
        values: dict[str, Any] = {}
        for field in fields(KDLossConfig):
            value = getattr(self, field.name)
            values[field.name] = value.at(step) if isinstance(value, Schedule) else value
        return KDLossConfig(**values)


Settings = TypeVar("Settings", bound="DataclassInstance")


def read_settings(
    cls: type[Settings], section: DictConfig | Mapping[str, Any], where: str
) -> Settings:
    """Return the dataclass `cls` filled from one section of the YAML.

    Args:
        section: The section; a key it lacks takes the dataclass's default.
        where: The section's path in the YAML, for the error.

    Raises:
        ValueError: A key that `cls` lacks, a value of another type, or one out of its range.
    """
    values = _plain(section)
    refuse_unknown_keys(values, [field.name for field in fields(cls)], where)
    for field in fields(cls):
        default, value = field.default, values.get(field.name, field.default)
        if isinstance(value, Mapping) and Schedule in get_args(field.type):
            values[field.name] = read_settings(Schedule, value, f"{where}.{field.name}")
            continue
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if default is not None and type(value) is not type(default):
            kind = "a list" if isinstance(default, tuple) else type(default).__name__
            raise ValueError(f"{where}.{field.name}: expected {kind}, got {value!r}")
        values[field.name] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_dump(config: DictConfig) -> tuple[DataConfig, SelectionConfig, CacheConfig]:
    """Read the sections that the teacher run has on every host.

    Raises:
        ValueError: A setting does not fit.
    """
    return (
        read_settings(DataConfig, config.data, "data"),
        read_settings(SelectionConfig, config.selection, "selection"),
        read_settings(CacheConfig, config.cache, "cache"),
    )


def refuse_unknown_keys(section: Iterable[Any], known: Iterable[str], where: str = "") -> None:
    """Refuse the first key of one section that is not `known`, and name the nearest that is.

    Hydra refuses a misspelt key by itself, but not one that `+` or a preset adds.

    Raises:
        ValueError: There is such a key.
    """
    known = list(known)
    prefix = f"{where}." if where else ""
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"{prefix}{key} is a key that nothing reads{hint}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _plain(section: Any) -> dict[str, Any]:
    if isinstance(section, DictConfig):
        section = OmegaConf.to_container(section, resolve=True)
    return dict(section)
