"""SFT data as people have it: files, formats, and the tokenizer's own chat template."""

from nemo_kd.chat.files import as_jsonl, format_of, is_dataset_directory, read_object
from nemo_kd.chat.formats import Conversation, detect, read_conversation
from nemo_kd.chat.render import Rendered, Renderer, template_of

__all__ = [
    "Conversation",
    "Rendered",
    "Renderer",
    "as_jsonl",
    "detect",
    "format_of",
    "is_dataset_directory",
    "read_conversation",
    "read_object",
    "template_of",
]
