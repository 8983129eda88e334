"""The students of a table: what the YAML says of each, and its model for lm-evaluation-harness."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_kd.cache.manifest import fingerprint_model
from nemo_kd.config import read_settings


@dataclass(frozen=True)
class Student:
    """One row of the table: the keys of an entry of `students` in conf/evaluate_students.yaml."""

    name: str = "???"
    objective: str = ""
    steps: int | None = None
    hf_path: str | None = None
    server: str | None = None
    model: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(f"expected a name of letters, digits and . _ + -, got {self.name}")
        if type(self.steps) not in (int, type(None)):
            raise ValueError(f"steps: expected an integer, got {self.steps!r}")
        if self.server is None and (self.model or self.tokenizer):
            raise ValueError("model and tokenizer are keys of a student with server")
        if self.server is None:
            _check_directory(self.hf_path, "hf_path", "config.json")
        elif not re.match(r"https?://", self.server) or not self.model or self.hf_path:
            raise ValueError(
                "expected hf_path, or server (http://HOST:PORT/v1) and model, got "
                f"hf_path={self.hf_path}, server={self.server}, model={self.model}"
            )
        if self.tokenizer is not None:
            _check_directory(self.tokenizer, "tokenizer", "tokenizer_config.json")

    def fingerprint(self) -> str:
        """What tells its answers from another student's: of a directory, a hash of its files."""
        directory = Path(self.hf_path or self.tokenizer or os.devnull)
        files = sorted(directory.iterdir()) if directory.is_dir() else []
        files = [file for file in files if file.is_file() and file.suffix != ".md"]
        # No weights can be read through a server.
        return fingerprint_model(files, f"{self.server} {self.model}" if self.server else "")

    def load(self, settings: Mapping[str, Any]) -> Any:
        """Its model, as lm-evaluation-harness calls it.

        Args:
            settings: The YAML's device, dtype, batch_size, max_length and num_concurrent.

        Raises:
            ValueError: The server does not answer, or it has no such model.
        """
        if self.hf_path is not None:
            from lm_eval.models.huggingface import HFLM

            return HFLM(
                pretrained=self.hf_path,
                device={"gpu": "cuda", "cpu": "cpu"}[settings["device"]],
                dtype=settings["dtype"],
                batch_size=settings["batch_size"],
                max_length=settings["max_length"],
            )
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        url = str(self.server).rstrip("/")
        self._check_server(url)
        return LocalCompletionsAPI(
            base_url=f"{url}/completions",
            model=self.model,
            tokenizer=self.tokenizer,
            # Without a tokenizer here the server gets texts; log-likelihoods need it.
            tokenizer_backend="huggingface" if self.tokenizer else None,
            tokenized_requests=self.tokenizer is not None,
            batch_size=settings["batch_size"],
            max_length=settings["max_length"] or 2048,
            num_concurrent=settings["num_concurrent"],
        )

    def _check_server(self, url: str) -> None:
        import requests

        headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
        try:
            answer = requests.get(f"{url}/models", headers=headers, timeout=20)
            answer.raise_for_status()
            names = [entry["id"] for entry in answer.json()["data"]]
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"students.{self.name}.server: expected an OpenAI-compatible server that lists its "
                f"models at {url}/models, got {error!s:.160}; start it, and end the URL in /v1"
            ) from error
        if self.model not in names:
            raise ValueError(
                f"students.{self.name}.model: expected one of {', '.join(names)}, got {self.model}"
            )


def read_students(given: Any) -> list[Student]:
    """The students of the YAML: a list of mappings, or the path of a YAML file that has one.

    Raises:
        ValueError: There is no such file, or an entry is none that can be judged.
    """
    if isinstance(given, str):
        if not Path(given).is_file():
            raise ValueError(f"students: expected a list or a YAML file with one, found no {given}")
        given = OmegaConf.to_container(OmegaConf.load(given), resolve=True)
        given = given.get("students") if isinstance(given, dict) else given
    if not isinstance(given, list) or not given or not all(isinstance(e, dict) for e in given):
        raise ValueError(f"students: expected a list [{{name: ..., ...}}, ...], got {given!r:.80}")
    students = [read_settings(Student, e, f"students.{e.get('name')}") for e in given]
    names = [student.name for student in students]
    if len(set(names)) < len(names):
        raise ValueError(f"students: expected names that differ, got {', '.join(names)}")
    return students


def _check_directory(path: str | None, key: str, needed: str) -> None:
    if path is None or not Path(path, needed).is_file():
        above = Path(path or ".").absolute().parent
        near = similar(Path(path or "").name, os.listdir(above) if above.is_dir() else [])
        raise ValueError(f"{key}: expected a directory with {needed}, got {path}{near}")


def similar(name: str, names: Iterable[str]) -> str:
    """A hint for a wrong name: the nearest right ones."""
    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
