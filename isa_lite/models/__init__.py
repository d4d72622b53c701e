"""What is frozen, and what is light: VL models, text towers, tokenizers, image backbones."""
