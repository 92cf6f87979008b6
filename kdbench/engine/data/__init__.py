"""A cell's data as training sees them: batches, and the data sets that they come from, resident or streamed."""
