"""Train a student on the teacher's top-K of a cache (KD) and on the labels (SFT).

    python examples/train_kd_sft.py model.restore_from_path=student.nemo \\
        model.data.train_ds.file_names=[cache] model.data.validation_ds.file_names=[heldout-cache]

conf/train_kd_sft.yaml lists every key. With model.knowledge_distillation.kd_loss_weight=0 and
model.knowledge_distillation.sft_loss_weight=1 it is plain SFT on the same samples.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="train_kd_sft")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.nemo.train import train_kd_sft  # seconds of imports, once the config is read

        train_kd_sft(config)


if __name__ == "__main__":
    answer_help(Path(__file__).parent / "conf" / "train_kd_sft.yaml")
    main()
