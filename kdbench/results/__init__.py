"""From the records of finished cells to tables, files and plots. Nothing here needs torch."""
