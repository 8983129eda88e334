"""Let the teacher, or the student, write answers to prompts.

    python examples/generate_answers.py model.hf_path=teacher-hf data.file_names=[prompts.jsonl] \\
        output=answers.jsonl capture.path=cache

conf/generate_answers.yaml lists the keys. After an interruption call the same command again: it
writes only what is missing.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="generate_answers")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.generate.run import (
            generate_answers,  # seconds of imports, once the config is read
        )

        generate_answers(config)


if __name__ == "__main__":
    answer_help(Path(__file__).parent / "conf" / "generate_answers.yaml")
    main()
