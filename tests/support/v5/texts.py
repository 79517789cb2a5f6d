"""The texts for testing the fixtures' tokenizers."""

TEXTS = [
    "Hello world, it's 12345 o'clock",
    "  two  spaces\n\n日本語のテキスト。 Cafe\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}<image></s><s> tail <|endoftext|>",
    "",
]
