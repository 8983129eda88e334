"""Turn a .nemo of the Llama family into a Hugging Face checkpoint: import_hf_llama.py's inverse.

    python examples/export_hf_llama.py source=kd.nemo output=kd-hf

Takes what import_hf_llama.py, train_kd_sft.py and NeMo itself write, at any tensor and pipeline
parallel size. Needs memory for the weights once, and no GPU. A model without biases becomes a
`llama` (which a Mistral without a sliding window is), one with biases in q, k and v a `qwen2`.
"""

import hydra
from omegaconf import DictConfig

from nemo_kd.process import user_errors


@hydra.main(version_base=None, config_path="conf", config_name="export_hf_llama")
def main(config: DictConfig) -> None:
    with user_errors():
        from nemo_kd.nemo.hf_export import (
            export_hf_llama,  # seconds of imports, once the config is read
        )

        export_hf_llama(config)


if __name__ == "__main__":
    main()
