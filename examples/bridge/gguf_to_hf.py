"""Write a GGUF file of the Llama family as a Hugging Face directory, which Megatron-Bridge reads.

python examples/bridge/gguf_to_hf.py model.gguf model-hf --keep-layers 0 6 12
"""

import argparse
from pathlib import Path

from nemo_kd.gguf import gguf_to_hf

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--keep-layers", type=int, nargs="+", help="all of them by default")
    given = parser.parse_args()
    gguf_to_hf(given.source, given.output, given.keep_layers)
