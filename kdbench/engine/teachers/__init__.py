"""Teachers: found and loaded, asked by a stage, and their logits kept in a table."""
