"""Training: from resolved cells to records. Everything that imports torch and runs lies here."""
