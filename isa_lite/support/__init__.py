"""What every part needs: settings, files, images, processes."""
