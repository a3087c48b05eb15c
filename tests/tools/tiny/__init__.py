"""The tiny model: its dialogues, tokenizer and weights."""
