"""Run the teacher once over SFT data with Megatron-Bridge and keep its top-K.

    python examples/bridge/dump_teacher_topk.py model.hf_path=teacher-hf \\
        data.file_names=[train.jsonl] cache.path=cache

conf/bridge/dump_teacher_topk.yaml lists the keys. After an interruption call the same command
again: it writes only the missing shards.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors

CONF = Path(__file__).parents[1] / "conf" / "bridge"


@hydra.main(version_base=None, config_path=str(CONF), config_name="dump_teacher_topk")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.bridge.dump import (
            dump_teacher_topk,  # seconds of imports, once the config is read
        )

        dump_teacher_topk(config)


if __name__ == "__main__":
    answer_help(CONF / "dump_teacher_topk.yaml")
    main()
