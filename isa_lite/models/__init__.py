"""What is frozen, and what is light: vision-language models, their text towers and tokenizers,
image backbones.
"""
