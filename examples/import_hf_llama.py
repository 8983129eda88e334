"""Turn a Hugging Face checkpoint (Llama, Mistral, Qwen2, Qwen3, Nemotron) into a .nemo.

    python examples/import_hf_llama.py source=SmolLM2-135M-Instruct.gguf output=teacher.nemo
    python examples/import_hf_llama.py source=student-hf output=student.nemo keep_layers=[0,15,31]

The .nemo is written at tensor and pipeline parallel size 1. NeMo can restore it at any other size.
"""

import os
from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_kd.process import announce, answer_help, user_errors


@hydra.main(version_base=None, config_path="conf", config_name="import_hf_llama")
def main(config: DictConfig) -> None:
    with user_errors():
        announce(config)
        # Every machine builds the same layers, and computes nothing with them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from nemo_kd.nemo.hf.importer import (
            import_hf_llama,  # seconds of imports, once the config is read
        )

        import_hf_llama(config)


if __name__ == "__main__":
    answer_help(Path(__file__).parent / "conf" / "import_hf_llama.yaml")
    main()
