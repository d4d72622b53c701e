"""The query side as files, and what it costs."""
