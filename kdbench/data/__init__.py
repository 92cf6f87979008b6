"""Where batches come from: data sets kept as bytes on the device, augmentation, splits, and addressed randomness."""
