"""Run the teacher once over SFT data and keep its top-K at every supervised token.

    python examples/dump_teacher_topk.py teacher.restore_from_path=teacher.nemo \\
        data.file_names=[train.jsonl] cache.path=cache

conf/dump_teacher_topk.yaml lists every key. After an interruption call the same command again: it
writes only the missing shards.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="dump_teacher_topk")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.nemo.dump import (
            dump_teacher_topk,  # seconds of imports, once the config is read
        )

        dump_teacher_topk(config)


if __name__ == "__main__":
    answer_help(Path(__file__).parent / "conf" / "dump_teacher_topk.yaml")
    main()
