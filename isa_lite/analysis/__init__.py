"""What a sentence holds, and what it depends on."""
