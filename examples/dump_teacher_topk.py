"""Run the teacher over SFT data once and keep its top-K at every supervised token.

    python examples/dump_teacher_topk.py teacher.restore_from_path=teacher.nemo \\
        data.file_names=[train.jsonl] cache.path=cache

conf/dump_teacher_topk.yaml lists every key. Call it again after an interruption: it writes the
shards that are missing.
"""

import hydra
from omegaconf import DictConfig

from nemo_kd.process import user_errors


@hydra.main(version_base=None, config_path="conf", config_name="dump_teacher_topk")
def main(config: DictConfig) -> None:
    with user_errors():
        from nemo_kd.nemo.dump import (
            dump_teacher_topk,  # seconds of imports, once the config is read
        )

        dump_teacher_topk(config)


if __name__ == "__main__":
    main()
