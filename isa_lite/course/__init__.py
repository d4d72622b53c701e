"""What the notebooks show: figures, panels, checks of answers."""
