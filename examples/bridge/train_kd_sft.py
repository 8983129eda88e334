"""Train a student on the teacher's top-K of caches with Megatron-Bridge.

    python examples/bridge/train_kd_sft.py model.hf_path=student-hf dataset.train_caches=[cache] \\
        dataset.validation_caches=[heldout-cache] save_hf=kd-hf

conf/bridge/train_kd_sft.yaml lists the keys.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors

CONF = Path(__file__).parents[1] / "conf" / "bridge"


@hydra.main(version_base=None, config_path=str(CONF), config_name="train_kd_sft")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.bridge.train import train_kd_sft  # seconds of imports, once the config is read

        train_kd_sft(config)


if __name__ == "__main__":
    answer_help(CONF / "train_kd_sft.yaml")
    main()
