"""How steps are computed: device, precision, memory, captured or not; chosen by measuring."""
