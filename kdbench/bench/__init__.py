"""Speed: the training loop's techniques one by one, and peers beside them, in interleaved rounds."""
