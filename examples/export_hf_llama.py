"""Turn a .nemo (Llama, Qwen2, Qwen3, Nemotron) into a Hugging Face checkpoint.

    python examples/export_hf_llama.py source=kd.nemo output=kd-hf

The .nemo may come from import_hf_llama.py, train_kd_sft.py or NeMo itself, at any tensor and
pipeline parallel size. The directory of a checkpoint of train_kd_sft.py is taken too. The export
needs no GPU, and memory for the weights once. NeMo's config says which family the model is of; a
Mistral becomes a `llama`, which computes the same.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="export_hf_llama")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        from nemo_kd.nemo.hf.exporter import (
            export_hf_llama,  # seconds of imports, once the config is read
        )

        export_hf_llama(config)


if __name__ == "__main__":
    answer_help(Path(__file__).parent / "conf" / "export_hf_llama.yaml")
    main()
