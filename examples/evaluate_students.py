"""Judge students by MMLU, HumanEval, MBPP, GSM8K and MATH, and print a table with a row for each.

    python examples/evaluate_students.py output=results run_untrusted_code=true \\
        'students=[{name: kd, hf_path: kd-hf, objective: KD + SFT, steps: 700}]'

A student is a Hugging Face directory, or a model of an OpenAI-compatible server. docs/evaluate.md
says how to run the tasks without the hub, and how to add tasks.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="evaluate_students")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.evaluate.run import (
            evaluate_students,
        )  # seconds of imports, once the config is read

        evaluate_students(config)


if __name__ == "__main__":
    answer_help(Path(__file__).parent / "conf" / "evaluate_students.yaml")
    main()
