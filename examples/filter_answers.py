"""Leave out answers that are cut, repeated or wrong, or that share text with held-out data.

    python examples/filter_answers.py data.file_names=[answers.jsonl] output=kept.jsonl \\
        filters=[cut,duplicates,majority]

conf/filter_answers.yaml lists the keys, docs/filter.md the filters. After an interruption call the
same command again: it judges only what is missing.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="filter_answers")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.filters.run import filter_answers

        filter_answers(config)


if __name__ == "__main__":
    answer_help(Path(__file__).parent / "conf" / "filter_answers.yaml")
    main()
